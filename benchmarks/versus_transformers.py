#!/usr/bin/env python3
"""Is our perplexity the one that Hugging Face transformers finds with the same weights?

    python benchmarks/versus_transformers.py MODEL_DIR --text FILE [--windows 64] [--context 512] [-o RESULT.json]

MODEL_DIR is an unpacked folder in the Hugging Face layout. Theirs: transformers' own model and tokenizer in float32,
windows cut here (not by `glm4run.text_windows`), cross entropy by torch over the model's whole vocabulary. Ours:
`glm4run eval` in float32. `difference` is a share of theirs.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from glm4run import load_model
from glm4run.evaluation import evaluate
from glm4run.machine import commit, cpu_name
from glm4run.text_windows import Cut, read_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    theirs, scored = their_perplexity(args.model, args.text.read_text("utf-8"), args.context, args.windows)
    model = load_model(args.model, dtype="fp32", context_len=args.context)
    summary = evaluate(model, read_text(args.text), Cut(args.context, windows=args.windows)).summary
    assert summary.tokens == scored, f"we score {summary.tokens} tokens, they {scored}"
    result = {
        "machine": cpu_name(),
        "commit": commit(),
        "windows": args.windows,
        "tokens": scored,
        "transformers": theirs,
        "glm4run": summary.perplexity.value,
        "difference": summary.perplexity.value / theirs - 1,
    }
    text = json.dumps(result, indent=2)
    print(text)
    if args.output is not None:
        args.output.write_text(text + "\n")


def their_perplexity(folder: Path, text: str, context: int, windows: int) -> tuple[float, int]:
    """Perplexity of the second halves of windows side by side, and how many tokens that were."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    prefix = [tokenizer.convert_tokens_to_ids(name) for name in ("[gMASK]", "<sop>") if name in tokenizer.get_vocab()]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    room = context - len(prefix)
    assert len(ids) >= windows * room, "the text is too short for so many windows"
    cut = [torch.tensor([*prefix, *ids[number * room : (number + 1) * room]]) for number in range(windows)]
    return perplexity_of_windows(folder, cut, vocabulary=None)


@torch.inference_mode()
def perplexity_of_windows(folder: Path, windows: list[Tensor], *, vocabulary: int | None) -> tuple[float, int]:
    """Perplexity of the second halves in float32, over the first `vocabulary` ids; and how many tokens that were."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total, count = 0.0, 0
    for window in windows:
        logits = model(window[None]).logits[0, :-1, :vocabulary]
        losses = F.cross_entropy(logits, window[1:], reduction="none")[len(window) // 2 :]
        total, count = total + float(losses.double().sum()), count + len(losses)
    return math.exp(total / count), count


if __name__ == "__main__":
    main()
