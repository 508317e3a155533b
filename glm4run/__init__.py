"""glm4run: the GLM-4-9B chat models, quantized, on an ordinary machine.

`load_model` and `SamplingParams` are the Python API. They are imported on first use, so that `import glm4run`
and the commands that need no model stay free of torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glm4run.generate import LoadedModel as LoadedModel
    from glm4run.generate import load_model as load_model
    from glm4run.sampling import SamplingParams as SamplingParams

__version__ = "0.1.0"
__all__ = ["LoadedModel", "SamplingParams", "load_model"]


def __getattr__(name: str) -> Any:
    if name in ("load_model", "LoadedModel"):
        from glm4run import generate

        return getattr(generate, name)
    if name == "SamplingParams":
        from glm4run.sampling import SamplingParams

        return SamplingParams
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
