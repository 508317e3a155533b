"""The offline step: a checkpoint in any layout to a packed folder, tensor by tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glm4run_quantize.convert import quantize_checkpoint as quantize_checkpoint

__all__ = ["quantize_checkpoint"]


def __getattr__(name: str) -> Any:
    # On first use: `glm4run --help` must not import torch.
    if name == "quantize_checkpoint":
        from glm4run_quantize.convert import quantize_checkpoint

        return quantize_checkpoint
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
