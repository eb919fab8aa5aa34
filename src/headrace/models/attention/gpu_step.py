"""What the Triton path knows of a batch: the tensors on the device and the tiles to launch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from headrace.models.attention.interface import AttentionStep

LEAST = 16  # smallest side of a matrix product in Triton


@dataclass(slots=True)
class Launch:
    """Tiles of one size.

    ``tasks`` int32[n, 11] are parts as the kernel reads them: first row, rows, start of the segment's context, first and
    last key, first and last own row, start of the segment, start of its mask (-1: a chain), words of a mask row, and room
    for the part's sums (-1: none needed). ``merges`` int32[m, 4] are the tiles that have several parts: first row, rows,
    first room, parts.
    """

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


def kernel_dims(q: torch.Tensor, v: torch.Tensor) -> dict[str, Any]:
    """Compile-time sizes that follow from the tensors."""
    return {"DIM": q.shape[2], "WIDE": v.shape[2], "BLOCK_D": padded(q.shape[2]), "BLOCK_W": padded(v.shape[2])}


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def padded(n: int) -> int:
    """The side of a block that holds ``n`` numbers."""
    return max(LEAST, _power_of_two(n))
