"""From a configuration to ranks that hold a model together."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from headrace.models.parallel.group import device_of, join
from headrace.models.parallel.ranks import Lost, Ranks, Setup

if TYPE_CHECKING:
    from headrace.core.config import EngineConfig
    from headrace.models.loaded import LoadedModel


def start_ranks(
    config: EngineConfig, load: dict[str, Any], runner: dict[str, Any], threads: int, on_lost: Lost | None = None
) -> Ranks:
    """Start the other ranks of ``config.tp``, which begin to load at once.

    Args:
        load, runner: arguments for :func:`headrace.models.load.load` and :class:`headrace.models.runner.ModelRunner`, alike on
            every rank.
        threads: CPU threads of all ranks together.
        on_lost: see :class:`Ranks`.

    Raises:
        HeadraceError: there are not as many devices, or a process cannot be started.
    """
    device_of(0, config.device, config.tp)  # a wrong number shall not cost a start
    each = max(1, threads // config.tp)
    torch.set_num_threads(each)
    return Ranks(
        Setup(
            rank=0,
            size=config.tp,
            store=Path(),
            device=config.device,
            threads=each,
            load=load,
            linears=config.linears,
            quantize=config.quantize,
            slots={
                "kv_gib": config.kv_gib,
                "max_context": config.max_context,
                "kv_cache_dtype": config.kv_cache_dtype,
            },
            runner=runner,
        ),
        on_lost,
    )


def load_share(ranks: Ranks, config: EngineConfig, load: dict[str, Any], *, progress: bool) -> LoadedModel:
    """Rank 0's part of the model, loaded while the others load theirs; raises as :func:`headrace.models.load.load`."""
    from headrace.models.load import load as load_model

    device = device_of(0, config.device, config.tp)
    join(ranks.group, ranks.store, device)
    return load_model(**load, device=str(device), group=ranks.group, progress=progress)
