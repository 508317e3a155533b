"""The tensors of a linear in a checkpoint that transformers saved with bitsandbytes. No torch.

4 bits (`kind` nf4 or fp4), blocks of 64 weights that run through the rows:

    weight                                uint8 [ceil(N*K/2), 1]  two values a byte
    weight.absmax                         float32 [blocks]; uint8 where the scales are quantized once more (nested)
    weight.quant_map                      float32 [16]            what each value stands for
    weight.nested_absmax, .nested_quant_map  float32 [ceil(blocks/256)], [256]   nested only
    weight.quant_state.bitsandbytes__<kind>  uint8 [any]          JSON: block size, shape, dtype, nested offset

8 bits (`llm_int8`): weight int8 [N, K] and SCB float32 [N], w = weight * SCB / 127; a `weight_format` that is always 0.
Source: bitsandbytes 0.50, `nn/modules.py` and `functional.QuantState`; files that transformers 5 wrote.
"""

from __future__ import annotations

from glm4run.quant_config import QuantScheme

ANY = -1  # a length that only the file knows
WEIGHT, SCALES_INT8 = "weight", "SCB"
ABSMAX, QUANT_MAP = "weight.absmax", "weight.quant_map"
NESTED_ABSMAX, NESTED_QUANT_MAP = "weight.nested_absmax", "weight.nested_quant_map"
NESTED_BLOCK = 256


def quant_state_name(scheme: QuantScheme) -> str:
    """The tensor that holds a JSON object."""
    return f"weight.quant_state.bitsandbytes__{scheme.kind}"


def bitsandbytes_tensor_shapes(
    out_features: int, in_features: int, scheme: QuantScheme
) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Suffix to (shape, allowed safetensors dtypes) of every tensor of one linear; ANY stands for any length."""
    if scheme.kind == "llm_int8":
        return {WEIGHT: ((out_features, in_features), ("I8",)), SCALES_INT8: ((out_features,), ("F32",))}
    assert scheme.group_size is not None
    count = out_features * in_features
    blocks = -(-count // scheme.group_size)
    shapes: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
        WEIGHT: ((-(-count // 2), 1), ("U8",)),
        ABSMAX: ((blocks,), ("U8",) if scheme.nested else ("F32",)),
        QUANT_MAP: ((16,), ("F32",)),
        quant_state_name(scheme): ((ANY,), ("U8",)),
    }
    if scheme.nested:
        shapes[NESTED_ABSMAX] = ((-(-blocks // NESTED_BLOCK),), ("F32",))
        shapes[NESTED_QUANT_MAP] = ((256,), ("F32",))
    return shapes
