"""Attention over chosen rows by the engine's own CPU kernel: every KV head of every sequence becomes a segment of its own."""

from __future__ import annotations

import importlib.util

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headrace.core.batch import Batch, StepShape

Ints = NDArray[np.int32]
_NONE = np.zeros(0, np.int32)


class Gathered:
    """Attends where K and V lie, without copying the chosen rows out; it belongs to one thread at a time."""

    def __init__(self) -> None:
        from headrace.models.attention.cpu import NumbaAttention

        self._backend = NumbaAttention()

    @staticmethod
    def takes(keys: Tensor) -> bool:
        """Whether these rows can be read where they lie."""
        usable = keys.device.type == "cpu" and keys.dtype in (torch.float32, torch.bfloat16)
        return usable and keys.is_contiguous() and importlib.util.find_spec("numba") is not None

    def attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, index: Tensor, valid: Tensor | None, scale: float
    ) -> Tensor:
        """As :func:`headrace.sparse.attend.attend_rows`.

        Args:
            queries: [R, G, D].
            keys, values: [B, H, capacity, D], contiguous; B * H = R.
            index: int[R, k], k at least 1.
            valid: bool[R, k] or None.

        Returns:
            float32[R, G, D].
        """
        rows, capacity = len(queries), keys.shape[2]
        slots = index.numpy().astype(np.int32) + (np.arange(rows, dtype=np.int32) * capacity)[:, None]
        if valid is None:
            own, context = slots[:, -1], np.ascontiguousarray(slots[:, :-1]).reshape(-1)
            starts = np.arange(rows + 1, dtype=np.int32) * np.int32(slots.shape[1] - 1)
        else:
            kept = [row[mask] for row, mask in zip(slots, valid.numpy(), strict=True)]
            own, context = np.array([row[-1] for row in kept], np.int32), np.concatenate([row[:-1] for row in kept])
            starts = np.cumsum([0, *(len(row) - 1 for row in kept)], dtype=np.int32)
        batch = Batch(
            ids=own, positions=np.diff(starts), write_slots=np.ascontiguousarray(own), query_starts=np.arange(rows + 1, dtype=np.int32),
            context_starts=starts, context_slots=context, mask_starts=np.zeros(rows + 1, np.int32), mask_words=_NONE,
            head_rows=_NONE, adapters=np.zeros(rows, np.int32), shape=StepShape(0, rows, len(context), rows, len(context) + rows),
        )  # fmt: skip
        step = self._backend.prepare(batch, keys.device)
        k, v = (part.view(-1, 1, part.shape[-1]) for part in (keys, values))
        return self._backend.attend(queries.float(), k, v, step, scale=scale)
