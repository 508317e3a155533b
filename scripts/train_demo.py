#!/usr/bin/env python3
"""Trains the embedded demo model from scratch, on text that this repository generates, with a fixed seed.

    python scripts/train_demo.py OUT_DIR [--minutes 72]   # bf16 checkpoint in the glm4 layout, about 11 MB
    glm4run quantize OUT_DIR -o models/demo --bits 4 --method rtn --overwrite

The model has the architecture of GLM-4-9B-0414 (sandwich norms, partial interleaved RoPE, grouped-query attention
with 2 KV heads, QKV bias, untied head), the family's special tokens and chat dialect, and about 5 million parameters.
For the last part of the run the linears see their weights rounded to the packed grid (straight-through), so that the
4-bit file that ships answers as the trained weights do.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Regex, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HfTokenizer
from torch import Tensor, nn
from torch.nn.utils import parametrize

import demo_corpus
from glm4run.chat_format import Message, encode_chat
from glm4run.config import parse_config
from glm4run.dialects import DIALECTS
from glm4run.model import Glm4Model
from glm4run.qformat import scale_groups
from glm4run.quant_config import QuantScheme
from glm4run.tokenizer import SPLIT_PATTERN, Tokenizer, byte_alphabet, load_tokenizer
from glm4run_quantize.methods.rtn import quantize_rtn

RANKS = 2800
TOKENIZER_CONVERSATIONS = 12000
TOKENS_PER_BATCH = 2048
PROMPT_WEIGHT = 0.1  # of a prompt token's loss against an answer token's
CONFIG = {
    "architectures": ["Glm4ForCausalLM"],
    "model_type": "glm4",
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 640,  # 5 x 128: like 13696 no multiple of 256
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "attention_bias": True,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=40.0, help="training time; the schedule fits itself to it")
    parser.add_argument("--steps", type=int, help="a fixed number of steps instead, for a run that repeats exactly")
    parser.add_argument("--continue-from", type=Path, help="start from the weights and tokenizer of an earlier OUT_DIR")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    if args.continue_from is None:
        write_tokenizer(args.out)
    else:
        shutil.copyfile(args.continue_from / "tokenizer.model", args.out / "tokenizer.model")
    tokenizer = load_tokenizer(args.out)
    write_configs(args.out, tokenizer)
    shutil.copyfile(Path(__file__).with_name("demo_chat_template.jinja"), args.out / "chat_template.jinja")
    config = parse_config(json.loads((args.out / "config.json").read_text()))
    model = Glm4Model(config)
    initialize_(model)
    if args.continue_from is not None:
        model.load_state_dict(load_file(args.continue_from / "model.safetensors"))
    print(f"{config.num_parameters:,} parameters, {tokenizer.vocab_size} tokens", flush=True)
    train(model, tokenizer, args.minutes * 60, args.steps)
    save(model, args.out)
    print(f"held-out questions answered: {judge(model, tokenizer):.0%}")


def write_tokenizer(out: Path) -> None:
    """Byte-level BPE over the corpus, written as a tiktoken file: `base64(token) rank` a line, rank = id."""
    trained = HfTokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=RANKS, initial_alphabet=alphabet, show_progress=False)
    stream = demo_corpus.conversations(seed=1)
    conversations = [next(stream) for _ in range(TOKENIZER_CONVERSATIONS)]
    trained.train_from_iterator((text for turns in conversations for _, text in turns), trainer)
    pieces = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    to_byte = {chr(code): byte for byte, code in byte_alphabet().items()}
    lines = []
    for piece, rank in pieces:
        raw = bytes(to_byte[character] for character in piece)
        lines.append(f"{base64.b64encode(raw).decode()} {rank}\n")
    (out / "tokenizer.model").write_text("".join(lines))


def write_configs(out: Path, tokenizer: Tokenizer) -> None:
    """config.json and generation_config.json with the ids of the tokenizer just trained."""
    stops = [tokenizer.special_id(name) for name in ("<|endoftext|>", "<|user|>", "<|observation|>")]
    vocab = -(-tokenizer.vocab_size // 64) * 64  # padded, like the family's 151552
    ids = {"eos_token_id": stops, "pad_token_id": stops[0]}
    (out / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": vocab, **ids}, indent=2) + "\n")
    generation = {**ids, "do_sample": False}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def initialize_(model: Glm4Model) -> None:
    """Normal weights scaled by fan-in; the branches' last projections smaller by the number of branches."""
    branches = 2 * model.config.num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            std = module.in_features**-0.5 / (branches**0.5 if name.endswith(("o_proj", "down_proj")) else 1.0)
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.normal_(model.model.embed_tokens.weight, std=0.02)
    nn.init.normal_(model.lm_head.weight, std=0.02)


def encode(tokenizer: Tokenizer, turns: list[demo_corpus.Turn]) -> tuple[list[int], list[float]]:
    """Ids of a conversation that ends in `<|user|>`, the family's stop after an answer, and each id's loss weight."""
    dialect = DIALECTS["0414"]
    messages = [Message(role=role, content=content) for role, content in turns]
    ids: list[int] = []
    weights: list[float] = []
    for count in (i + 1 for i, message in enumerate(messages) if message.role == "assistant"):
        prompt = encode_chat(tokenizer, dialect, messages[: count - 1], add_generation_prompt=True)
        whole = encode_chat(tokenizer, dialect, messages[:count], add_generation_prompt=False)
        weights += [PROMPT_WEIGHT] * (len(prompt) - len(ids)) + [1.0] * (len(whole) - len(prompt))
        ids = whole
    stop = tokenizer.special_id("<|user|>")
    assert stop is not None
    # In the middle of a conversation the `<|user|>` of the next turn is the stop of the answer before it.
    weights = [1.0 if i > 2 and token == stop else w for i, (token, w) in enumerate(zip(ids, weights, strict=True))]
    return [*ids, stop], [*weights, 1.0]


def batches(tokenizer: Tokenizer) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (ids [B, T], weights [B, T]): conversations of similar length side by side, padded with weight 0."""
    stream = demo_corpus.conversations(seed=2)
    order = random.Random(3)
    while True:
        pool = sorted((encode(tokenizer, next(stream)) for _ in range(1024)), key=lambda item: len(item[0]))
        rows: list[tuple[list[int], list[float]]] = []
        ready = []
        for row in pool:
            if rows and (len(rows) + 1) * len(row[0]) > TOKENS_PER_BATCH:
                ready.append(rows)
                rows = []
            rows.append(row)
        order.shuffle(ready)
        for rows in ready:
            width = max(len(ids) for ids, _ in rows)
            yield (
                torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows]),
                torch.tensor([weights + [0.0] * (width - len(weights)) for _, weights in rows]),
            )


class FakeQuantize(nn.Module):
    """The weight rounded to the packed grid, with the gradient of the weight itself."""

    def __init__(self, scheme: QuantScheme) -> None:
        super().__init__()
        self.scheme = scheme

    def forward(self, weight: Tensor) -> Tensor:
        with torch.no_grad():
            q, scale = quantize_rtn(weight, self.scheme, torch.bfloat16)
            rounded = scale_groups(q, scale)
        straight_through: Tensor = weight + (rounded - weight).detach()
        return straight_through


def train(
    model: Glm4Model, tokenizer: Tokenizer, seconds: float, steps: int | None, *, rounded_from: float = 0.7
) -> None:
    """AdamW with warm-up and a linear fall to zero over the time (or the steps) given.

    From the share `rounded_from` of it on the linears see their weights rounded; never where it is 1.
    """
    decayed = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), eps=1e-8)
    rounded = False
    started, shown, mean = time.monotonic(), 0.0, 0.0
    for step, (ids, weights) in enumerate(batches(tokenizer)):
        done = step / steps if steps else (time.monotonic() - started) / seconds
        if done >= 1:
            break
        if done > rounded_from and not rounded:
            rounded = True
            add_fake_quantization(model)
            print("from here on the linears see their packed weights", flush=True)
        for group in optimizer.param_groups:
            group["lr"] = 2.5e-3 * min(1.0, (step + 1) / 150) * min(1.0, 1.02 - done)
        loss = batch_loss(model, ids, weights)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        mean = loss.item() if step == 0 else 0.98 * mean + 0.02 * loss.item()
        elapsed = time.monotonic() - started
        if elapsed - shown > 30:
            shown = elapsed
            print(f"{elapsed:6.0f} s  step {step}  loss {mean:.3f}", flush=True)
    if not math.isfinite(mean):
        raise SystemExit("training diverged")
    for module in model.modules():
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)


def batch_loss(model: Glm4Model, ids: Tensor, weights: Tensor) -> Tensor:
    """Weighted cross-entropy of every next token."""
    logits = model(ids[:, :-1], logits="all")
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    target_weights = weights[:, 1:].flatten()
    return (loss * target_weights).sum() / target_weights.sum()


def add_fake_quantization(model: Glm4Model) -> None:
    """What the default int4 recipe will do to each linear, applied to its forward."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            bits = 8 if name == "lm_head" else 4
            group_size = 32 if name.endswith("down_proj") else 128
            parametrize.register_parametrization(module, "weight", FakeQuantize(QuantScheme(bits, group_size)))


def save(model: Glm4Model, out: Path) -> None:
    """The weights in bf16 under their Hugging Face names."""
    tensors = {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, str(out / "model.safetensors"), metadata={"format": "pt"})


@torch.no_grad()
def judge(model: Glm4Model, tokenizer: Tokenizer, max_tokens: int = 80) -> float:
    """The share of `HELD_OUT` questions whose greedy answer contains what it must; prints the misses."""
    stops = {tokenizer.special_id(name) for name in ("<|endoftext|>", "<|user|>", "<|observation|>")}
    right = 0
    for question, expected in demo_corpus.HELD_OUT:
        ids = encode_chat(tokenizer, DIALECTS["0414"], [Message("user", question)])
        start = len(ids)
        while len(ids) < start + max_tokens and ids[-1] not in stops:
            ids.append(int(model(torch.tensor(ids))[-1].argmax()))
        answer = tokenizer.decode(ids[start:]).strip()
        right += expected.lower() in answer.lower()
        if expected.lower() not in answer.lower():
            print(f"  missed: {question!r} -> {answer!r} (expected {expected!r})")
    return right / len(demo_corpus.HELD_OUT)


if __name__ == "__main__":
    main()
