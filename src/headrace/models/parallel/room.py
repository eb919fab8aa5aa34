"""How many slots there are when every rank holds a part of each."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from headrace.models.budget import kv_slots

if TYPE_CHECKING:
    from headrace.models.loaded import LoadedModel
    from headrace.models.parallel.group import Group


def shared_slots(
    model: LoadedModel, group: Group, kv_gib: float | None, max_context: int | None, kv_cache_dtype: str = "auto"
) -> int:
    """Slots that fit on every rank; all ranks call this together and get the same number.

    Args:
        kv_gib: GiB for K and V over all ranks together; None as for :func:`headrace.models.budget.kv_slots`.
        max_context: longest prompt plus output in tokens; None for the model's own.
        kv_cache_dtype: how K and V are kept.

    Raises:
        InvalidRequest: as ``kv_slots``.
    """
    context = max_context or model.card.context
    if model.device.type == "cpu":  # the ranks share one memory, which must hold the whole of each slot
        slots = kv_slots(replace(model, config=model.module.config), kv_gib, context, kv_cache_dtype)
    else:
        slots = kv_slots(model, None if kv_gib is None else kv_gib / group.size, context, kv_cache_dtype)
    least = torch.tensor(slots, device=model.device)
    torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
    return int(least)
