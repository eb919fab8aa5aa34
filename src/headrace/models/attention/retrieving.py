"""Attention of some segments by somebody else than the backend: the seam at which sparse attention meets the engine."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from headrace.core.batch import Batch
from headrace.models.cache.planes import Planes, Scales


class Retriever(Protocol):
    """Attends to segments that read a share of their context, in layers without window, soft cap and sinks."""

    def begin(self, batch: Batch, planes: Planes) -> NDArray[np.bool_] | None:
        """Get ready for a step: bool[S], the segments it takes on; None for none."""

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        out: torch.Tensor,
        scale: float,
        scales: Scales | None,
    ) -> None:
        """Fill the rows of its segments in one layer; own K and V are in place.

        Args:
            q: [N, Hq, D].
            keys, values: the layer's planes [slots, Hkv, D].
            out: [N, Hq, D].
            scale: factor on the scores.
            scales: float32[slots, Hkv] of int8 planes.
        """

    def forget(self, sequence: int) -> None:
        """Let go of what is kept about a sequence."""


def without_context(batch: Batch, taken: NDArray[np.bool_]) -> Batch:
    """``batch`` as the backend shall see it: segments that are ``taken`` have no context, so that attending to them costs nothing."""
    lengths = np.diff(batch.context_starts)
    kept = np.repeat(~taken, lengths)
    starts = np.zeros(len(batch.context_starts), np.int32)
    np.cumsum(np.where(taken, 0, lengths), out=starts[1:])
    return replace(batch, context_starts=starts, context_slots=np.ascontiguousarray(batch.context_slots[kept]))
