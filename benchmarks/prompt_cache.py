#!/usr/bin/env python3
"""What reading a prompt costs, what keeping it costs, and what recalling it costs instead.

    python benchmarks/prompt_cache.py MODEL_DIR [--tokens 256,512,1024,2048] [--threads N] [-o RESULT.json]

Each prompt is prefilled, kept in a folder of its own and recalled by a new prompt cache, whose first look at the
weights' fingerprint is part of the time. The files were just written, so they come from the system's page cache; a disk
adds its own time for the bytes given. `times_cheaper` is prefill over recall.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from glm4run import LoadedModel, load_model
from glm4run.machine import commit, cpu_name
from glm4run.prompt_cache import PromptCache
from glm4run.prompt_store import total_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", default="256,512,1024,2048")
    parser.add_argument("--threads", type=int)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    sizes = [int(word) for word in args.tokens.split(",")]
    model = load_model(args.model, context_len=max(sizes) + 1, threads=args.threads)
    model.prefill(list(range(40, 72)), model.new_context())  # the first forward is slower
    rows = [_row(model, tokens) for tokens in sizes]
    result = {"machine": cpu_name(), "commit": commit(), "model": model.name, "backend": model.backend_detail}
    text = json.dumps({**result, "rows": rows}, indent=2)
    print(text)
    if args.output is not None:
        args.output.write_text(text + "\n", encoding="utf-8")


def _row(model: LoadedModel, tokens: int) -> dict[str, Any]:
    ids = [40 + n * n % 199 for n in range(tokens + 1)]
    context = model.new_context()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        started = time.perf_counter()
        model.prefill(ids, context)
        prefill_s = time.perf_counter() - started
        cache = PromptCache(model, root=root)
        cache.offer(context, ids, 0)
        started = time.perf_counter()
        cache.keep()
        keep_s = time.perf_counter() - started
        again = model.new_context()
        started = time.perf_counter()
        recalled = PromptCache(model, root=root).recall(again, ids)
        recall_s = time.perf_counter() - started
        nbytes = total_bytes(root)
    return {
        "tokens": tokens,
        "recalled": recalled,
        "bytes": nbytes,
        "prefill_s": round(prefill_s, 4),
        "keep_s": round(keep_s, 4),
        "recall_s": round(recall_s, 4),
        "times_cheaper": round(prefill_s / recall_s, 1) if recalled else None,
    }


if __name__ == "__main__":
    main()
