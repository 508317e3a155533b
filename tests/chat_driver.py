"""`glm4run chat` with a model that says what a script tells it to, in a process of its own.

`python -m tests.chat_driver SCRIPT.json FOLDER ...`. The script has `answers`, one a generation, the seconds that a
decoded token and a chunk of a prompt take (`token_s`, `prefill_s`), and the `chunk`. The model may write arguments that
do not fit unless `structured` is true.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glm4run import generate, generation
from glm4run.cli import main
from glm4run.kv_cache import KVCache
from tests.scripted import ScriptedModel, with_script


class Talker(ScriptedModel):
    """Begins the next answer with each prefill."""

    def __init__(self, answers: list[list[int]], token_s: float, prefill_s: float) -> None:
        super().__init__()
        self.answers, self.token_s, self.prefill_s = answers, token_s, prefill_s
        self.has_begun = True

    def hidden_states(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        assert cache is not None
        if len(ids) > 1:
            time.sleep(self.prefill_s)
            self.script, self.has_begun = list(self.answers[0]), False
        else:
            time.sleep(self.token_s)
            if not self.has_begun and len(self.answers) > 1:  # not with its prefill: that may only be a probe
                self.answers.pop(0)
            self.has_begun = True
        return super().hidden_states(ids, cache)


def scripted(real: Callable[..., generate.LoadedModel], script: dict[str, Any]) -> Callable[..., generate.LoadedModel]:
    """`load_model` whose models say what the script says."""

    def load(*words: Any, **options: Any) -> generate.LoadedModel:
        loaded = real(*words, **options)
        answers = [loaded.tokenizer.encode(f"\n{text}") for text in script["answers"]]
        model, _ = with_script(loaded, "")
        talker = Talker(answers, script.get("token_s", 0.0), script.get("prefill_s", 0.0))
        object.__setattr__(model, "model", talker)
        plan = model.plan
        object.__setattr__(plan, "chunk", script.get("chunk", plan.chunk))
        return model

    return load


if __name__ == "__main__":
    torch.set_num_threads(1)
    wanted = json.loads(Path(sys.argv[1]).read_text())
    generate.load_model = scripted(generate.load_model, wanted)
    if not wanted.get("structured"):
        vars(generation)["has_engine"] = lambda: False
    main(["chat", *sys.argv[2:]])
