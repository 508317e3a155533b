"""What lies between the linears of a layer: norms, SwiGLU, rotation, attention. In torch, natively, and in Triton.

`Ops` is the torch code, which runs everywhere and is the reference. `NativeOps` gives the same results up to rounding,
faster on a CPU, `TritonOps` on CUDA; both leave to torch whatever their kernels do not take. The model gets one of the
three when it is made.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from glm4run.attention import grouped_query_attention
from glm4run.kernels.cpu import ops as native
from glm4run.kernels.cpu.library import why_missing
from glm4run.kernels.triton import why_missing as triton_missing
from glm4run.kv_rows import KVLayer, KVRows, attend_turned
from glm4run.layers import rms_norm
from glm4run.memory import attends_natively
from glm4run.rope import apply_rope

Turns = tuple[Tensor, Tensor]  # cosine and sine of the tokens at hand, float32 [T, R/2]


class Ops:
    """The operations in torch."""

    name = "torch"  # as `memory.Compute` knows them

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [..., size] to the same shape and dtype."""
        return rms_norm(x, weight, eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """[..., 2 size] to [..., size]: silu of the first half times the second."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def rope(self, x: Tensor, head_dim: int, cos: Tensor, sin: Tensor) -> Tensor:
        """x [..., T, heads * D], which may be overwritten, to turned heads [..., heads, T, D]; cos, sin [T, R/2]."""
        return apply_rope(split_heads(x, head_dim), cos, sin)

    def attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """`attention.grouped_query_attention`: query [..., H, T, D] to [..., T, H * D]."""
        return grouped_query_attention(query, key, value)

    def attend_alone(self, projected: list[Tensor], head_dim: int, rope: Turns) -> Tensor:
        """Attention of tokens to each other: what the projections made of them, each [..., T, heads * D], to
        [..., T, H * D]. The list is emptied, so that what is not needed any more is gone."""
        return self.attention(*self._heads(projected, head_dim, rope))

    def attend_new(self, projected: list[Tensor], head_dim: int, rope: Turns, cache: KVLayer, start: int) -> Tensor:
        """The same for the tokens from position `start` on, each [T, heads * D], and all before them, which the cache
        holds; it keeps the new ones."""
        query, key, value = self._heads(projected, head_dim, rope)
        self.append(cache, start, key, value)
        del key, value  # attention reads the cache
        return self.attend(query, cache, start + query.shape[1])

    def _heads(self, projected: list[Tensor], head_dim: int, rope: Turns) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys turned by their positions, and values: [..., heads, T, D] each. Empties the list."""
        value, key, query = (projected.pop() for _ in range(3))
        query = self.rope(query, head_dim, *rope)
        key = self.rope(key, head_dim, *rope)
        return query, key, split_heads(value, head_dim)

    def append(self, cache: KVLayer, start: int, key: Tensor, value: Tensor) -> None:
        """Keeps key and value [KVH, T, D] from position `start` on."""
        cache.keys.write(start, key)
        cache.values.write(start, value)

    def attend(self, query: Tensor, cache: KVLayer, end: int) -> Tensor:
        """`attention` over the first `end` positions of a cache: query [H, T, D] to [T, H * D]."""
        if cache.is_quantized:
            return attend_turned(query, cache, end, grouped_query_attention)
        return self.attention(query, cache.keys.read(end), cache.values.read(end))


class NativeOps(Ops):
    """The operations in the native library, where it takes the tensors."""

    name = "native"

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if not native.runs(x, weight):
            return super().rms_norm(x, weight, eps)
        return native.rms_norm(x, weight.float(), eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return native.silu_mul(gate_up) if native.runs(gate_up) else super().silu_mul(gate_up)

    def rope(self, x: Tensor, head_dim: int, cos: Tensor, sin: Tensor) -> Tensor:
        if x.ndim != 2 or 2 * cos.shape[-1] > native.MAX_ROTARY_DIM or not native.runs(x, cos, sin):
            return super().rope(x, head_dim, cos, sin)
        return split_heads(native.rope_(x, head_dim, cos, sin), head_dim)

    def append(self, cache: KVLayer, start: int, key: Tensor, value: Tensor) -> None:
        rows = key.stride(-1) == value.stride(-1) == 1 and key.stride() == value.stride() and key.dtype == value.dtype
        if rows and native.takes(key, value) and native.takes_cache(cache, key.shape[-1]):
            native.append(cache, start, key, value)
        else:
            super().append(cache, start, key, value)

    def attend(self, query: Tensor, cache: KVLayer, end: int) -> Tensor:
        heads, tokens, head_dim = query.shape
        suits = tokens <= native.FEW_TOKENS or attends_natively(heads, cache.keys.data.shape[0])
        floats = {rows.data.dtype for rows in (cache.keys, cache.values) if rows.scales is None}
        takes = native.takes(query) and native.takes_cache(cache, head_dim) and floats <= {query.dtype}
        if suits and takes and query.stride(-1) == 1:
            return native.attention(query, cache, end)
        return super().attend(query, cache, end)

    def attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        alone = query.ndim == 3 and (
            query.shape[1] <= native.FEW_TOKENS or attends_natively(query.shape[0], key.shape[0])
        )
        rows = all(t.stride(-1) == 1 for t in (query, key, value))
        packed = rows and key.stride(1) == key.shape[2] and value.stride() == key.stride()
        same = query.dtype == key.dtype == value.dtype
        if not (alone and packed and same and native.takes(query, key, value)):
            return super().attention(query, key, value)
        return native.attention(query, KVLayer(KVRows(key), KVRows(value)), key.shape[1])


class TritonOps(Ops):
    """The operations in Triton, for tensors on CUDA; what the kernels do not take is left to torch."""

    name = "triton"

    def __init__(self) -> None:
        # Imported here: on a CPU nobody needs Triton to be there.
        from glm4run.kernels.triton import attention, cache, elementwise

        self.attending, self.caching, self.elementwise = attention, cache, elementwise

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self.elementwise.rms_norm(x.contiguous(), weight, eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return self.elementwise.silu_mul(gate_up.contiguous())

    def attend_new(self, projected: list[Tensor], head_dim: int, rope: Turns, cache: KVLayer, start: int) -> Tensor:
        query = projected[0]
        if self._why_not(cache, query.unflatten(-1, (-1, head_dim)).transpose(0, 1)) is not None:
            return super().attend_new(projected, head_dim, rope, cache, start)
        out = torch.empty_like(query)
        value, key, query = (projected.pop() for _ in range(3))
        turned = self.caching.rope_append(query, key, value, *rope, cache, start)
        del key, value, query  # attention reads the cache
        return self.attending.attend(turned, cache, start, out=out)

    def append(self, cache: KVLayer, start: int, key: Tensor, value: Tensor) -> None:
        if self._why_not(cache, key) is not None or not key.stride(-1) == value.stride(-1) == 1:
            super().append(cache, start, key, value)
        else:
            self.caching.append(cache, start, key, value)

    def attend(self, query: Tensor, cache: KVLayer, end: int) -> Tensor:
        if self._why_not(cache, query) is not None or query.stride(-1) != 1:
            return super().attend(query, cache, end)
        return self.attending.attend(query, cache, end - query.shape[1])

    def _why_not(self, cache: KVLayer, query: Tensor) -> str | None:
        return self.caching.why_not(cache, query.shape[0], query.shape[-1], query.dtype)


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """[..., T, heads * D] to [..., heads, T, D]."""
    heads: Tensor = x.unflatten(-1, (-1, head_dim)).transpose(-3, -2)
    return heads


def choose_ops(backend: str, device: torch.device) -> Ops:
    """The fastest operations for a device, unless the user named a backend of torch's or they are not there."""
    if device.type == "cuda":
        return TritonOps() if backend in ("auto", "triton") and triton_missing(device) is None else Ops()
    return NativeOps() if backend in ("auto", "native") and why_missing() is None else Ops()
