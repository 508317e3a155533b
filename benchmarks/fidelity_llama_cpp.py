#!/usr/bin/env python3
"""llama.cpp's quantization types on the ruler of `fidelity.py`: the same reference, windows and figures.

    python -m venv PEER_ENV
    CMAKE_ARGS="-DGGML_NATIVE=ON" PEER_ENV/bin/pip install --no-binary llama-cpp-python llama-cpp-python gguf numpy
    python benchmarks/fidelity_llama_cpp.py SOURCE_DIR --text wiki.test.raw --work DIR --peer-python PEER_ENV/bin/python
        [--windows 64] [--types Q4_0 IQ4_NL+ ...] [-o JSON]

SOURCE_DIR is the model of `make_real_checkpoint.py` in the layout `glm`, whose linears are those of a Llama: they are
written to a GGUF in float32, quantized there by llama.cpp itself, read back with the `gguf` package, and put into the
source in float32. Embedding and head stay dense. A type with "+" gets an importance matrix: the mean squares of each
linear's inputs over the tokens that `fidelity.py` calibrates on, as `llama-imatrix` would collect them. DIR may be
that of `fidelity.py`: the reference's logits are then used again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from fidelity import CONTEXT, Bench, cut_texts, table
from gguf.quants import dequantize
from torch import Tensor, nn

from glm4run import LoadedModel, load_model
from glm4run.checkpoint.reader import CheckpointReader
from glm4run.config import ModelConfig, parse_config, read_json
from glm4run.machine import commit, cpu_name
from glm4run.tokenizer import load_tokenizer
from glm4run_quantize.calibration import read_calibration
from glm4run_quantize.importance import InputMoments

TYPES = ("Q4_0", "Q4_0+", "IQ4_NL", "IQ4_NL+", "Q4_1", "Q4_K_M", "Q4_K_M+", "Q5_0", "Q8_0")
# A linear's name in a layer to its tensors' in a block of a GGUF, one behind the other.
TENSORS = {
    "self_attn.q_proj": ("attn_q",),
    "self_attn.k_proj": ("attn_k",),
    "self_attn.v_proj": ("attn_v",),
    "self_attn.o_proj": ("attn_output",),
    "mlp.gate_up_proj": ("ffn_gate", "ffn_up"),
    "mlp.down_proj": ("ffn_down",),
}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--peer-python", type=Path, required=True, help="the interpreter that has llama_cpp and gguf")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--calibration-tokens", type=int, default=32768)
    parser.add_argument("--types", nargs="*", choices=TYPES, default=list(TYPES), metavar="TYPE")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    evaluated, calibration = cut_texts(args.text, args.work)
    bench = Bench(args.source, args.work, evaluated, calibration, args.windows, args.calibration_tokens)
    peer = Peer(bench, args.peer_python)
    results = [peer.row(kind) for kind in args.types]
    facts = {"machine": cpu_name(), "commit": commit(), "windows": args.windows, "rows": results}
    if args.output is not None:
        args.output.write_text(json.dumps(facts, indent=2) + "\n")
    print(table(results))


@dataclasses.dataclass
class Peer:
    """Makes and measures llama.cpp's rows, beside those of `bench` and remembered like them."""

    bench: Bench
    python: Path
    _model: LoadedModel | None = None

    def row(self, kind: str) -> dict[str, Any]:
        """The figures of one type."""
        kept = self.bench.work / f"llama-cpp-{kind}-{self.bench.windows}-{self.bench.calibration_tokens}.json"
        if kept.is_file():
            found: dict[str, Any] = json.loads(kept.read_text())
            return found
        weights, bits = read_linears(self._quantized(kind))
        if self._model is None:
            self._model = load_model(self.bench.source, dtype="fp32", context_len=CONTEXT)
        replace_linears(self._model, weights)
        row = self.bench.measure(kind, bits, "llama.cpp", self._model)
        kept.write_text(json.dumps(row))
        return row

    def _quantized(self, kind: str) -> Path:
        work, name = self.bench.work, kind.removesuffix("+")
        dense, output = work / "llama-cpp.gguf", work / f"llama-cpp-{kind}.gguf"
        config = parse_config(read_json(self.bench.source / "config.json"), where=str(self.bench.source))
        if not dense.is_file():
            with CheckpointReader(self.bench.source, config) as reader:
                write_llama(dense, reader, config)
        words = ["quantize", str(dense), "--type", name, "-o", str(output)]
        if kind.endswith("+"):
            words += ["--importance", str(self._importance(config))]
        script = Path(__file__).with_name("llama_cpp_peer.py")
        subprocess.run([str(self.python), str(script), *words], check=True, stderr=subprocess.DEVNULL)
        return output

    def _importance(self, config: ModelConfig) -> Path:
        path = self.bench.work / f"llama-cpp-importance-{self.bench.calibration_tokens}.npz"
        if not path.is_file():
            tokenizer = load_tokenizer(self.bench.source)
            ids = read_calibration(tokenizer, self.bench.calibration, self.bench.calibration_tokens).ids
            with CheckpointReader(self.bench.source, config) as reader:
                moments = InputMoments(reader, config, ids)
                arrays = {
                    f"blk.{layer}.{tensor}.weight": moments.of(f"model.layers.{layer}.{name}").numpy()
                    for layer in range(config.num_hidden_layers)
                    for name, tensors in TENSORS.items()
                    for tensor in tensors
                }
            np.savez(path, allow_pickle=False, **arrays)
        return path


def write_llama(path: Path, reader: CheckpointReader, config: ModelConfig) -> None:
    """The model as a Llama in float32. GLM's rotary positions pair neighbours, as a GGUF's do: no row moves."""
    plain = config.partial_rotary_factor == 1 and not config.has_sandwich_norms
    assert plain, "only a model whose layers are a Llama's can be written as one"
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for name, ours in (
        ("token_embd", "model.embed_tokens"),
        ("output_norm", "model.norm"),
        ("output", "lm_head"),
    ):
        writer.add_tensor(f"{name}.weight", reader.read(f"{ours}.weight").float().numpy())
    for layer in range(config.num_hidden_layers):
        prefix, block = f"model.layers.{layer}.", f"blk.{layer}."
        for ours, name in NORMS.items():
            writer.add_tensor(f"{block}{name}.weight", reader.read(f"{prefix}{ours}.weight").float().numpy())
        for ours, names in TENSORS.items():
            parts = reader.read(f"{prefix}{ours}.weight").float().chunk(len(names))
            for name, part in zip(names, parts, strict=True):
                writer.add_tensor(f"{block}{name}.weight", part.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_linears(path: Path) -> tuple[dict[str, Tensor], float]:
    """The layers' linears of a GGUF in float32 by our names, and their bits per weight."""
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    weights: dict[str, Tensor] = {}
    nbytes = 0
    for block in sorted({int(name.split(".")[1]) for name in stored if name.startswith("blk.")}):
        for ours, names in TENSORS.items():
            tensors = [stored[f"blk.{block}.{name}.weight"] for name in names]
            nbytes += sum(int(tensor.n_bytes) for tensor in tensors)
            parts = [torch.from_numpy(dequantize(tensor.data, tensor.tensor_type)) for tensor in tensors]
            weights[f"model.layers.{block}.{ours}"] = torch.cat(parts)
    return weights, 8 * nbytes / sum(weight.numel() for weight in weights.values())


def replace_linears(loaded: LoadedModel, weights: dict[str, Tensor]) -> None:
    """Gives a dense model these weights."""
    for name, weight in weights.items():
        linear = loaded.model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        assert linear.weight.shape == weight.shape
        linear.weight = nn.Parameter(weight, requires_grad=False)


if __name__ == "__main__":
    main()
