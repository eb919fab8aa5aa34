"""What fits the memory: weights, and how many slots of K and V beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from headrace.core.errors import InvalidRequest, OutOfMemory
from headrace.models.cache import planes

if TYPE_CHECKING:
    from headrace.models.loaded import LoadedModel

GIB = 1 << 30
# Shares of the memory that is free once the model is loaded. A CPU's memory belongs to other programs too, so there is a ceiling.
CPU_SHARE, CPU_CEILING_GIB = 0.25, 4.0
GPU_SHARE = 0.85


def check_weights(name: str, parameters: int, dtype: torch.dtype, device: torch.device) -> None:
    """Raise :class:`OutOfMemory` when ``parameters`` numbers of ``dtype`` exceed the free memory of ``device``."""
    needed, free = parameters * dtype.itemsize, _free_bytes(device)
    if needed > free:
        kind = str(dtype).removeprefix("torch.")
        smaller = (
            "a smaller model or one at half the precision (dtype bfloat16)" if dtype.itemsize > 2 else "a smaller model"
        )
        raise OutOfMemory(
            f"{name} needs {needed / GIB:.1f} GiB for its weights in {kind}, but {free / GIB:.1f} GiB are free on {device}: "
            f"use {smaller}",
            field="model",
        )


def slot_bytes(model: LoadedModel, kv_cache_dtype: str = "auto") -> int:
    """Bytes that one token's K and V take over all layers."""
    return planes.slot_bytes(model.config, model.dtype, kv_cache_dtype)


def kv_slots(model: LoadedModel, kv_gib: float | None, max_context: int, kv_cache_dtype: str = "auto") -> int:
    """Slots that fit.

    Args:
        kv_gib: GiB for K and V; None takes a share of the free memory (a quarter on the CPU and at most 4 GiB there, 85 % on a GPU),
            but always one full context.
        max_context: longest prompt plus output in tokens.
        kv_cache_dtype: how K and V are kept, see :func:`headrace.models.cache.planes.add_planes`.

    Raises:
        InvalidRequest: ``kv_gib`` cannot hold one sequence of ``max_context`` tokens, or no memory can; the message has the numbers.
    """
    each, free = slot_bytes(model, kv_cache_dtype), _free_bytes(model.device)
    needed = each * max_context
    if kv_gib is not None:
        slots = int(kv_gib * GIB) // each
        if slots < max_context:
            raise InvalidRequest(
                f"kv_gib is {kv_gib:g}, which holds {slots} tokens at {each} bytes each, less than one sequence of {max_context}: "
                f"give at least {_up(needed / GIB)} GiB, or lower max_context",
                field="kv_gib",
            )
        if slots * each > free:
            raise InvalidRequest(
                f"kv_gib is {kv_gib:g}, but {free / GIB:.2f} GiB are free on {model.device}: lower it", field="kv_gib"
            )
        return slots
    if needed > free:
        raise InvalidRequest(
            f"one sequence of {max_context} tokens needs {needed / GIB:.2f} GiB of K and V ({each} bytes a token), but "
            f"{free / GIB:.2f} GiB are free on {model.device}: lower max_context to at most {free // each}",
            field="max_context",
        )
    share = free * GPU_SHARE if model.device.type == "cuda" else min(free * CPU_SHARE, CPU_CEILING_GIB * GIB)
    return max(int(share) // each, max_context)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)


def _up(gib: float) -> str:
    """``gib`` to three significant digits, rounded up so that the suggestion is enough."""
    text = f"{gib:.3g}"
    return text if float(text) >= gib else f"{gib * 1.01:.3g}"
