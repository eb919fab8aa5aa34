"""What one slot holds: K and V of every layer, as they are or as int8 with a scale per K/V head.

In int8 a slot's K (and likewise its V) of one head is ``scale * codes`` with codes from -127 to 127 and ``scale`` its largest
magnitude over 127. Scales are planes like any other, so what copies or frees slots needs to know nothing of them. A row is coded by
itself, hence its codes depend neither on the batch it came in nor on what stood in the slot before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headrace.core.errors import InvalidRequest
from headrace.models.families import kv_shape

if TYPE_CHECKING:
    from headrace.models.cache.slots import SlotPool

KV_CACHE_DTYPES = ("auto", "int8")
TOP = 127  # the largest code
_LEAST = 1e-30  # magnitudes below count as 0, so that the inverse of a scale stays finite

Scales = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Planes:
    """K and V of every layer.

    Attributes:
        keys, values: per layer, [slots, Hkv, D] of the model's dtype or int8.
        scales: per layer, those of K and V, float32[slots, Hkv] each; None where ``keys`` and ``values`` are no codes.
    """

    keys: list[Tensor]
    values: list[Tensor]
    scales: list[Scales] | None


def add_planes(pool: SlotPool, config: Any, dtype: torch.dtype, device: torch.device, kv_cache_dtype: str) -> Planes:
    """Add ``k.{layer}`` and ``v.{layer}`` to ``pool``, and for int8 ``k_scale.{layer}`` and ``v_scale.{layer}``.

    Args:
        config: the model's configuration.
        dtype: the model's.
        kv_cache_dtype: "auto" for ``dtype``, or "int8".

    Raises:
        InvalidRequest: for another ``kv_cache_dtype``.
    """
    coded = is_int8(kv_cache_dtype)
    depth, heads, size = kv_shape(config)
    stored = torch.int8 if coded else dtype

    def add(kind: str, shape: tuple[int, ...], kept: torch.dtype) -> list[Tensor]:
        return [pool.add_plane(f"{kind}.{layer}", shape, kept, device) for layer in range(depth)]

    keys, values = add("k", (heads, size), stored), add("v", (heads, size), stored)
    if not coded:
        return Planes(keys, values, None)
    pairs = zip(add("k_scale", (heads,), torch.float32), add("v_scale", (heads,), torch.float32), strict=True)
    return Planes(keys, values, list(pairs))


def slot_bytes(config: Any, dtype: torch.dtype, kv_cache_dtype: str = "auto") -> int:
    """Bytes that one token's K and V take over all layers; raises as :func:`add_planes`."""
    depth, heads, size = kv_shape(config)
    each = size + torch.float32.itemsize if is_int8(kv_cache_dtype) else size * dtype.itemsize
    return 2 * depth * heads * each


def is_int8(kv_cache_dtype: str) -> bool:
    """Whether K and V are kept as int8; raises InvalidRequest for a name that is none of ``KV_CACHE_DTYPES``."""
    if kv_cache_dtype not in KV_CACHE_DTYPES:
        raise InvalidRequest(
            f"kv_cache_dtype is {kv_cache_dtype!r}: give one of {', '.join(KV_CACHE_DTYPES)}", field="kv_cache_dtype"
        )
    return kv_cache_dtype == "int8"


def encode(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8[..., D] codes and float32[...] scales of ``x`` [..., D], each row by itself.

    Codes are rounded half to even from ``x * (127 / largest)``, in float32, which any other writer of slots must do alike.
    """
    x = x.float()
    largest = x.abs().amax(-1)
    codes = (x * (TOP / largest.clamp_min(_LEAST)).unsqueeze(-1)).round_().to(torch.int8)
    return codes, largest / TOP


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """float32[..., D] of int8[..., D] codes and float32[...] scales."""
    return codes.float() * scales.unsqueeze(-1)


def write(planes: Tensor, slots: Tensor, rows: Tensor, scales: Tensor | None = None) -> None:
    """Put ``rows`` [N, Hkv, D] into ``slots`` (int64[N]) of a plane; with ``scales``, as codes."""
    if scales is None:
        planes.index_copy_(0, slots, rows)
        return
    codes, found = encode(rows)
    planes.index_copy_(0, slots, codes)
    scales.index_copy_(0, slots, found)
