"""What the Triton path knows of a batch: the tensors on the device and the tiles to launch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from headrace.core.batch import Ints
from headrace.models.attention.gpu_cut import cut, padded
from headrace.models.attention.interface import AttentionStep, check_window


@dataclass(slots=True)
class Launch:
    """:class:`headrace.models.attention.gpu_cut.Tables` on the device."""

    tasks: torch.Tensor
    merges: torch.Tensor
    parts: int


@dataclass(slots=True)
class TritonStep(AttentionStep):
    """A batch on the device, and launches per (head group, window), each by tile size."""

    device: torch.device
    positions: torch.Tensor
    writes: torch.Tensor
    slots: torch.Tensor
    words: torch.Tensor
    launches: dict[tuple[int, int | None], dict[int, Launch]] = field(default_factory=dict)

    def launches_of(self, group: int, window: int | None) -> dict[int, Launch]:
        """What to launch for layers of ``group`` query heads per K/V head and ``window``, by packed queries of a tile."""
        key = (group, window)
        if key not in self.launches:
            check_window(window)
            self.launches[key] = {
                block: Launch(self._put(tables.tasks), self._put(tables.merges), tables.parts)
                for block, tables in cut(self.batch, group, window).items()
            }
        return self.launches[key]

    def _put(self, table: Ints) -> torch.Tensor:
        return torch.from_numpy(table).to(self.device)


def kernel_dims(q: torch.Tensor, v: torch.Tensor) -> dict[str, Any]:
    """Compile-time sizes that follow from the tensors."""
    return {"DIM": q.shape[2], "WIDE": v.shape[2], "BLOCK_D": padded(q.shape[2]), "BLOCK_W": padded(v.shape[2])}
