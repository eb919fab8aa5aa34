"""Attention on the GPU: Triton kernels over slots, long contexts split and merged by log-sum-exp."""

from __future__ import annotations

import importlib.util
import os
from typing import ClassVar

import numpy as np
import torch

from headrace.core.batch import WORD_BITS, Batch
from headrace.models.attention.gpu_step import Launch, TritonStep, padded
from headrace.models.attention.interface import AttentionBackend, check_window

PART = 512  # context keys of a part: 8 K/V heads over 8k of context fill a large GPU with one sequence
ROWS = 64  # packed queries of a tile
NO_WINDOW = 1 << 30


class TritonAttention(AttentionBackend):
    """The GPU's fast path; with ``TRITON_INTERPRET=1`` set before triton is imported it also runs, slowly, on CPU tensors."""

    name: ClassVar[str] = "triton"

    @staticmethod
    def problem(kind: str) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed (pip install triton)"
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        if kind != "cuda" or not torch.cuda.is_available():
            return "it needs a CUDA device"
        return None

    def prepare(self, batch: Batch, device: torch.device) -> TritonStep:
        def put(array: np.ndarray) -> torch.Tensor:
            # A copy: the batch's buffers are written again while the device may still be reading.
            return torch.from_numpy(array.copy()).to(device, non_blocking=True)

        return TritonStep(
            batch,
            device,
            positions=put(batch.positions),
            writes=put(batch.write_slots),
            slots=put(batch.context_slots),
            words=put(batch.mask_words),
        )

    def attend(
        self,
        q: torch.Tensor,
        k_plane: torch.Tensor,
        v_plane: torch.Tensor,
        step: TritonStep,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
        scales: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        from headrace.models.attention import gpu_kernel

        heads, group = k_plane.shape[1], q.shape[1] // k_plane.shape[1]
        key = (group, window)
        if key not in step.launches:
            check_window(window)
            step.launches[key] = _launches(step.batch, group, window, step.device)
        out = q.new_empty(q.shape[0], q.shape[1], v_plane.shape[2])
        for block, launch in step.launches[key].items():
            gpu_kernel.run(
                q.contiguous(),
                k_plane,
                v_plane,
                out,
                sinks,
                scales,
                step,
                launch,
                heads=heads,
                block=block,
                scale=scale,
                window=NO_WINDOW if window is None else window,
                softcap=softcap,
            )
        return out


def _launches(batch: Batch, group: int, window: int | None, device: torch.device) -> dict[int, Launch]:
    """Cut a batch into tiles by size and parts; how a segment is cut depends on that segment alone."""
    tasks: dict[int, list[tuple[int, ...]]] = {}
    merges: dict[int, list[tuple[int, ...]]] = {}
    parts_of: dict[int, int] = {}
    wide = NO_WINDOW if window is None else window
    for s in range(batch.segments):
        start, stop = int(batch.query_starts[s]), int(batch.query_starts[s + 1])
        held = int(batch.context_starts[s + 1] - batch.context_starts[s])
        rows = max(1, ROWS // group)
        block = padded(min(stop - start, rows) * group)
        chain = batch.mask_starts[s] == batch.mask_starts[s + 1]
        mask = -1 if chain else int(batch.mask_starts[s])
        width = (stop - start + WORD_BITS - 1) // WORD_BITS
        for first in range(start, stop, rows):
            last = min(first + rows, stop)
            low = int(batch.positions[first:last].min()) - wide + 1
            key = min(max(low, 0), held)
            own = start
            if chain and key == held:
                own += int(np.searchsorted(batch.positions[start:last], low))
            count = max(1, -(-(held - key) // PART)) if stop - start <= rows else 1
            room = parts_of.setdefault(block, 0)
            for part in range(count):
                final = part + 1 == count
                until = held if final else key + (part + 1) * PART
                owned = (own, last) if final else (last, last)
                place = room + part if count > 1 else -1
                task = (
                    first,
                    last - first,
                    int(batch.context_starts[s]),
                    key + part * PART,
                    until,
                    *owned,
                    start,
                    mask,
                    width,
                    place,
                )
                tasks.setdefault(block, []).append(task)
            if count > 1:
                merges.setdefault(block, []).append((first, last - first, room, count))
                parts_of[block] += count

    def put(items: list[tuple[int, ...]], columns: int) -> torch.Tensor:
        return torch.tensor(items, dtype=torch.int32).view(-1, columns).to(device)

    return {b: Launch(put(t, 11), put(merges.get(b, []), 4), parts_of[b]) for b, t in tasks.items()}
