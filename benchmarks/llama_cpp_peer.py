#!/usr/bin/env python3
"""llama.cpp's side of `versus_llama_cpp.py` and `fidelity_llama_cpp.py`, in an environment of its own.

    python benchmarks/llama_cpp_peer.py write --type q4_0|q8_0 -o FILE.gguf [--layers N]
    python benchmarks/llama_cpp_peer.py serve FILE.gguf [--ctx 4096] [--threads N] [--no-mmap]
    python benchmarks/llama_cpp_peer.py quantize FILE.gguf --type Q4_K_M -o FILE.gguf [--importance FILE.npz]

It runs in an environment of its own, with `llama-cpp-python` built for this CPU and `gguf`; it imports nothing of
glm4run.

`write` makes a synthetic GLM-4-9B-Chat: true shapes, random blocks, the tensor types that `llama-quantize` gives them
(Q4_0: every matrix but output.weight, which is Q6_K; Q8_0: every matrix). A decoded token reads every matrix once, and
one row of token_embd: 5,098,045,440 bytes for Q4_0 (linears 4,588,830,720, head 509,214,720), 9,327,345,664 for Q8_0.
The command prints the figure of the file that it wrote.

`serve` loads a GGUF, prints one line of JSON about what it loaded, and then answers each line on stdin,
`{"test": "prefill"|"decode", "tokens": N, "depth": D}`, with `{"seconds": S, "tokens": N}`: the cache is cut or
filled to D positions untimed, then N positions are evaluated as llama-bench does, in batches (prefill) or one by one
after a first one, with the logits computed for each (decode), and no sampling.

`quantize` is llama.cpp's own quantizer through the C interface that its `llama-quantize` uses, with embedding and head
left in float32. The importance matrix holds an array per tensor of the file: the mean square of each input channel, the
quotient of the sums and counts that `llama-imatrix` collects.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import random
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Quant

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, ROPE_DIM = 4096, 40, 32, 2, 128, 64
FFN, VOCAB, CONTEXT, RMS_EPS, ROPE_BASE = 13696, 151552, 131072, 1.5625e-07, 5_000_000.0
EOS_ID = 151329  # <|endoftext|>

POOL_BLOCKS = 1 << 20
WEIGHT_STD = 0.02
F16_BYTES = 2
SEQUENCE = 0  # the one that llama_batch_get_one gives its tokens to
BATCH = 512  # llama.cpp's default for n_ubatch

# Of each block: the offset of its fp16 scale, and the standard deviation of the integer that random bytes encode. A
# Q6_K weight is d * (int8 scale of its 16 weights) * (6-bit integer).
BLOCKS = {
    Quant.Q4_0: (0, 16 / math.sqrt(12)),
    Quant.Q8_0: (0, 256 / math.sqrt(12)),
    Quant.Q6_K: (208, 64 / math.sqrt(12) * 256 / math.sqrt(12)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser("write", help="write a synthetic GLM-4-9B-Chat")
    write.add_argument("--type", choices=("q4_0", "q8_0"), required=True)
    write.add_argument("-o", "--output", type=Path, required=True)
    write.add_argument("--layers", type=int, default=LAYERS)
    serve_parser = commands.add_parser("serve", help="load a file and answer timing requests from stdin")
    serve_parser.add_argument("file", type=Path)
    serve_parser.add_argument("--ctx", type=int, default=4096)
    serve_parser.add_argument("--threads", type=int, default=os.cpu_count())
    serve_parser.add_argument("--no-mmap", action="store_true", help="read the weights into memory of our own")
    quantize_parser = commands.add_parser("quantize", help="quantize a GGUF by llama.cpp")
    quantize_parser.add_argument("file", type=Path)
    quantize_parser.add_argument("--type", required=True, help="as llama-quantize names it: Q4_0, IQ4_NL, Q4_K_M")
    quantize_parser.add_argument("-o", "--output", type=Path, required=True)
    quantize_parser.add_argument("--importance", type=Path, help="an .npz of a float32 array per tensor")
    args = parser.parse_args()
    if args.command == "quantize":
        quantize(args.file, args.output, args.type, args.importance)
    elif args.command == "write":
        write_model(args.output, args.type, args.layers)
        print(f"{args.output}: {args.output.stat().st_size:,} bytes, {weight_bytes(args.output):,} per decoded token")
    else:
        serve(args.file, context_len=args.ctx, threads=args.threads, mmap=not args.no_mmap)


# --- write ----------------------------------------------------------------------------------------------------------


def write_model(output: Path, kind: Literal["q4_0", "q8_0"], layers: int = LAYERS) -> None:
    """Writes the file, one tensor in memory at a time."""
    writer = gguf.GGUFWriter(output, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.CHATGLM])
    _add_metadata(writer, kind, layers)
    tensors = dict(_tensors(kind, layers))
    for name, (shape, quant) in tensors.items():
        stored = gguf.quant_shape_to_byte_shape(shape, quant)
        dtype = np.dtype(np.float32 if quant == Quant.F32 else np.uint8)
        writer.add_tensor_info(name, shape if quant == Quant.F32 else stored, dtype, math.prod(stored), raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    source = _RandomBlocks()
    for name, (shape, quant) in tensors.items():
        if quant == Quant.F32:
            fill = 0.0 if name.endswith(".bias") else 1.0
            writer.write_tensor_data(np.full(shape, fill, dtype=np.float32))
        else:
            writer.write_tensor_data(source.take(quant, math.prod(shape)))
    writer.close()


def weight_bytes(path: Path) -> int:
    """What a decoded token reads of the file: all matrices but the embedding, of which it reads one row."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    if "output.weight" in tensors:
        del tensors["token_embd.weight"]  # else the head is tied to it
    return sum(int(tensor.n_bytes) for tensor in tensors.values() if len(tensor.shape) == 2)


def _add_metadata(writer: gguf.GGUFWriter, kind: Literal["q4_0", "q8_0"], layers: int) -> None:
    """GLM-4-9B-Chat's parameters, as llama.cpp's converter writes them; a tokenizer that has the ids but no text."""
    writer.add_name("synthetic GLM-4-9B-Chat")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_block_count(layers)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(RMS_EPS)
    writer.add_rope_dimension_count(ROPE_DIM)
    writer.add_rope_freq_base(ROPE_BASE)
    file_types = {"q4_0": gguf.LlamaFileType.MOSTLY_Q4_0, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
    writer.add_file_type(file_types[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("chatglm-bpe")
    writer.add_token_list([f"<{token}>" for token in range(VOCAB)])
    writer.add_token_types([gguf.TokenType.NORMAL] * VOCAB)
    writer.add_token_merges(["< >"])  # an empty list is not written, and no list is an error
    writer.add_add_bos_token(False)
    writer.add_eos_token_id(EOS_ID)


def _tensors(kind: Literal["q4_0", "q8_0"], layers: int) -> Iterator[tuple[str, tuple[tuple[int, ...], Quant]]]:
    """Each tensor's name, shape (rows first) and type."""
    quant = {"q4_0": Quant.Q4_0, "q8_0": Quant.Q8_0}[kind]
    qkv = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    yield "token_embd.weight", ((VOCAB, HIDDEN), quant)
    for layer in range(layers):
        block = f"blk.{layer}"
        yield f"{block}.attn_norm.weight", ((HIDDEN,), Quant.F32)
        yield f"{block}.attn_qkv.weight", ((qkv, HIDDEN), quant)
        yield f"{block}.attn_qkv.bias", ((qkv,), Quant.F32)
        yield f"{block}.attn_output.weight", ((HIDDEN, HEADS * HEAD_DIM), quant)
        yield f"{block}.ffn_norm.weight", ((HIDDEN,), Quant.F32)
        yield f"{block}.ffn_up.weight", ((2 * FFN, HIDDEN), quant)
        yield f"{block}.ffn_down.weight", ((HIDDEN, FFN), quant)
    yield "output_norm.weight", ((HIDDEN,), Quant.F32)
    yield "output.weight", ((VOCAB, HIDDEN), Quant.Q6_K if kind == "q4_0" else quant)


class _RandomBlocks:
    """Quantized blocks from pools that are cut at random places: writing is then bound by the disk."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(0)
        self.pools: dict[Quant, npt.NDArray[np.uint8]] = {}

    def take(self, quant: Quant, weights: int) -> npt.NDArray[np.uint8]:
        """The blocks of so many weights, shape (blocks, bytes of a block)."""
        if quant not in self.pools:
            self.pools[quant] = self._pool(quant)
        pool = self.pools[quant]
        block_weights, block_bytes = gguf.GGML_QUANT_SIZES[quant]
        blocks = np.empty((weights // block_weights, block_bytes), dtype=np.uint8)
        for first in range(0, len(blocks), POOL_BLOCKS // 2):
            piece = blocks[first : first + POOL_BLOCKS // 2]
            start = int(self.generator.integers(0, len(pool) - len(piece) + 1))
            piece[:] = pool[start : start + len(piece)]
        return blocks

    def _pool(self, quant: Quant) -> npt.NDArray[np.uint8]:
        """Random bytes, with scales that give the weights a sensible spread, so that activations stay finite."""
        scale_at, integer_std = BLOCKS[quant]
        pool = self.generator.integers(0, 256, (POOL_BLOCKS, gguf.GGML_QUANT_SIZES[quant][1]), dtype=np.uint8)
        scales = self.generator.uniform(0.8, 1.2, (POOL_BLOCKS, 1)) * (WEIGHT_STD / integer_std)
        pool[:, scale_at : scale_at + F16_BYTES] = scales.astype("<f2").view(np.uint8)
        return pool


# --- serve ----------------------------------------------------------------------------------------------------------


def serve(path: Path, *, context_len: int, threads: int, mmap: bool) -> None:
    """Answers requests until stdin ends."""
    runner = LlamaCpp(path, context_len=context_len, threads=threads, mmap=mmap)
    _say({**runner.about, "weight_bytes_per_token": weight_bytes(path)})
    for line in sys.stdin:
        request = json.loads(line)
        seconds = runner.time(request["test"], request["tokens"], request.get("depth", 0))
        _say({"seconds": seconds, "tokens": request["tokens"]})


class LlamaCpp:
    """One model in one context, through the C interface: the calls that llama-bench makes."""

    def __init__(self, path: Path, *, context_len: int, threads: int, mmap: bool) -> None:
        import llama_cpp

        self.c: Any = llama_cpp
        self.log: list[str] = []
        self._log_callback = self.c.llama_log_callback(
            self._on_log
        )  # llama.cpp keeps the pointer, so we keep the object
        self.c.llama_log_set(self._log_callback, ctypes.c_void_p(0))
        self.c.llama_backend_init()
        started = time.perf_counter()
        model_params = self.c.llama_model_default_params()
        model_params.use_mmap = mmap
        self.model = self.c.llama_model_load_from_file(str(path).encode(), model_params)
        if not self.model:
            self._fail(f"{path}: llama.cpp cannot load it")
        params = self.c.llama_context_default_params()
        params.n_ctx = context_len
        params.n_batch = params.n_ubatch = BATCH
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = self.c.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self.context = self.c.llama_init_from_model(self.model, params)
        if not self.context:
            self._fail(f"no context of {context_len} tokens")
        self.memory = self.c.llama_get_memory(self.context)
        self.vocab_len = self.c.llama_vocab_n_tokens(self.c.llama_model_get_vocab(self.model))
        self.random = random.Random(0)
        self.time("prefill", min(32, context_len))  # warms up, reads every page of the file
        self.time("decode", 1)
        self._require_finite_logits()
        load_s = time.perf_counter() - started
        head_dim = self.c.llama_model_n_embd(self.model) // self.c.llama_model_n_head(self.model)
        kv_width = self.c.llama_model_n_head_kv(self.model) * head_dim
        buffers = re.findall(r"(\S+) model buffer size = +([\d.]+) MiB", "".join(self.log))
        self.about = {
            "llama_cpp_python": llama_cpp.__version__,
            "system_info": self.c.llama_print_system_info().decode(),
            "model_buffers_mib": {name: float(size) for name, size in buffers},
            "kv_bytes_per_position": 2 * self.c.llama_model_n_layer(self.model) * kv_width * F16_BYTES,
            "threads": threads,
            "context": context_len,
            "mmap": mmap,
            "load_s": round(load_s, 2),
        }

    def time(self, test: Literal["prefill", "decode"], tokens: int, depth: int = 0) -> float:
        """Seconds for `tokens` positions behind `depth` others, which are not timed."""
        if test not in ("prefill", "decode"):
            raise ValueError(f"unknown test {test!r}")
        kept = min(depth, self.c.llama_memory_seq_pos_max(self.memory, SEQUENCE) + 1)
        self.c.llama_memory_seq_rm(self.memory, SEQUENCE, kept, -1)
        self._evaluate(self._random_ids(depth - kept), BATCH)
        if test == "decode":
            self._evaluate(self._random_ids(1), 1)  # the first step after a prefill is not typical: it builds the graph
        ids = self._random_ids(tokens)
        started = time.perf_counter()
        self._evaluate(ids, BATCH if test == "prefill" else 1)
        return time.perf_counter() - started

    def _random_ids(self, count: int) -> ctypes.Array[ctypes.c_int32]:
        return (ctypes.c_int32 * count)(*(self.random.randrange(self.vocab_len) for _ in range(count)))

    def _evaluate(self, ids: ctypes.Array[ctypes.c_int32], batch: int) -> None:
        """Decodes the ids in batches, with the logits of each batch's last position, and waits for the result."""
        for first in range(0, len(ids), batch):
            count = min(batch, len(ids) - first)
            piece = (ctypes.c_int32 * count).from_buffer(ids, first * ctypes.sizeof(ctypes.c_int32))
            status = self.c.llama_decode(self.context, self.c.llama_batch_get_one(piece, count))
            if status != 0:
                self._fail(f"llama_decode returned {status}")
            self.c.llama_synchronize(self.context)

    def _require_finite_logits(self) -> None:
        logits = self.c.llama_get_logits_ith(self.context, -1)
        if not np.isfinite(np.ctypeslib.as_array(logits, (self.vocab_len,))).all():
            self._fail("the logits are not finite")

    def _on_log(self, level: int, text: bytes, user_data: object) -> None:
        self.log.append(text.decode(errors="replace"))

    def _fail(self, message: str) -> None:
        sys.exit("".join(self.log) + message)


# --- quantize -------------------------------------------------------------------------------------------------------


def quantize(source: Path, output: Path, kind: str, importance: Path | None) -> None:
    """Quantizes all but embedding and head to llama.cpp's `kind`."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = gguf.LlamaFileType[f"MOSTLY_{kind}"]
    params.token_embedding_type = params.output_tensor_type = Quant.F32
    arrays = {} if importance is None else dict(np.load(importance))
    pointer = ctypes.POINTER(ctypes.c_float)
    entries = [
        llama_cpp.llama_model_imatrix_data(name.encode(), array.ctypes.data_as(pointer), array.size)
        for name, array in arrays.items()
    ]
    if entries:  # an entry without a name ends the list
        entries.append(llama_cpp.llama_model_imatrix_data())
        params.imatrix = (llama_cpp.llama_model_imatrix_data * len(entries))(*entries)
    if llama_cpp.llama_model_quantize(str(source).encode(), str(output).encode(), ctypes.byref(params)):
        sys.exit(f"llama.cpp cannot quantize {source} to {kind}")


def _say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
