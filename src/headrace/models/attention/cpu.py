"""Attention on the CPU: a numba kernel over slots in place, run on torch's own threads."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from headrace.core.batch import Batch
from headrace.models.attention import team
from headrace.models.attention.interface import AttentionBackend, AttentionStep
from headrace.models.attention.reference import ReferenceAttention, ReferenceStep

# Multiply-adds below which waking other threads costs more than it saves.
SERIAL = 1 << 18
NO_WINDOW = 1 << 30
STORAGE = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@dataclass(slots=True)
class _Tiles:
    """The work of a step for one head group and window."""

    tiles: NDArray[np.int32]
    pairs: int  # (row, key) pairs
    parts: int  # room for partial sums


@dataclass(slots=True)
class NumbaStep(AttentionStep):
    """Key slots per segment, tiles per (head group, window), and what the fallback needs, made when it is needed."""

    keys: NDArray[np.int32]
    device: torch.device
    tiles: dict[tuple[int, int], _Tiles] = field(default_factory=dict)
    fallback: ReferenceStep | None = None


class NumbaAttention(AttentionBackend):
    """The CPU's fast path for float32 and bfloat16 planes; float16 ones go to the reference."""

    name: ClassVar[str] = "numba"

    def __init__(self) -> None:
        self._block = np.zeros(32, np.int64)
        self._counter = np.zeros(1, np.int64)
        self._numbers = np.zeros(2, np.float32)
        self._partial = np.zeros(1, np.float32)
        self._done = np.zeros(1, np.int64)
        self._reference = ReferenceAttention()

    @staticmethod
    def problem(kind: str) -> str | None:
        if kind != "cpu":
            return "it works on the CPU only"
        if importlib.util.find_spec("numba") is None:
            return "numba is not installed (pip install numba)"
        return None

    def prepare(self, batch: Batch, device: torch.device) -> NumbaStep:
        contexts, queries = batch.context_starts, batch.query_starts
        keys = np.empty(len(batch.context_slots) + len(batch.write_slots), np.int32)
        _kernel().join_keys(contexts, queries, batch.context_slots, batch.write_slots, keys)
        return NumbaStep(batch, keys, device)

    def attend(
        self,
        q: torch.Tensor,
        k_plane: torch.Tensor,
        v_plane: torch.Tensor,
        step: NumbaStep,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        storage = STORAGE.get(k_plane.dtype)
        if storage is None or not (k_plane.is_contiguous() and v_plane.is_contiguous()):
            if step.fallback is None:
                step.fallback = self._reference.prepare(step.batch, step.device)
            return self._reference.attend(
                q, k_plane, v_plane, step.fallback, scale=scale, window=window, softcap=softcap, sinks=sinks
            )
        queries = q.detach().to(torch.float32).contiguous()
        out = torch.empty(q.shape[0], q.shape[1], v_plane.shape[2])
        extra = None if sinks is None else sinks.detach().to(torch.float32).contiguous()
        work = _tiles(step, q.shape[1] // k_plane.shape[1], NO_WINDOW if window is None else window)
        self._numbers[:] = scale, softcap or 0.0
        self._fill(queries, k_plane, v_plane, out, extra, step, work, window)
        pairs = work.pairs * q.shape[1] * q.shape[2]
        threads = 1 if pairs < SERIAL else min(torch.get_num_threads(), len(work.tiles) * k_plane.shape[1])
        team.run(_worker(storage).address, self._block.ctypes.data, threads=threads)
        return out.to(q.dtype)

    def _fill(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        sinks: torch.Tensor | None,
        step: NumbaStep,
        work: _Tiles,
        window: int | None,
    ) -> None:
        """Write the worker's argument block (see ``kernel.ARGUMENTS``)."""
        batch, (slots, heads, dim), wide = step.batch, k.shape, v.shape[2]
        packed = max(_kernel().PACKED, q.shape[1] // heads)
        if work.parts:
            self._room(heads * work.parts, packed * (wide + 2))
        self._counter[0] = 0
        self._block[:30] = (
            self._counter.ctypes.data,
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            out.data_ptr(),
            0 if sinks is None else sinks.data_ptr(),
            batch.positions.ctypes.data,
            batch.query_starts.ctypes.data,
            batch.context_starts.ctypes.data,
            step.keys.ctypes.data,
            batch.mask_starts.ctypes.data,
            batch.mask_words.ctypes.data,
            work.tiles.ctypes.data,
            self._partial.ctypes.data,
            self._done.ctypes.data,
            self._numbers.ctypes.data,
            len(q),
            q.shape[1],
            slots,
            heads,
            dim,
            wide,
            batch.segments,
            len(step.keys),
            0 if sinks is None else len(sinks),
            len(batch.mask_words),
            len(work.tiles),
            work.parts,
            packed,
            NO_WINDOW if window is None else window,
        )

    def _room(self, parts: int, size: int) -> None:
        """Have room for ``parts`` partial results of ``size`` numbers; the counters beside them rest at zero."""
        if parts * size > len(self._partial):
            self._partial = np.empty(parts * size, np.float32)
        if parts > len(self._done):
            self._done = np.zeros(parts, np.int64)


def _tiles(step: NumbaStep, group: int, window: int) -> _Tiles:
    """The tiles for a head group and window, largest first so that threads finish together."""
    if (group, window) not in step.tiles:
        batch = step.batch
        tiles = _kernel().plan(
            batch.query_starts, batch.context_starts, batch.mask_starts, batch.positions, group, window
        )
        pairs = (tiles[:, 2] - tiles[:, 1]).astype(np.int64) * (tiles[:, 4] - tiles[:, 3])
        tiles = np.ascontiguousarray(tiles[np.argsort(-pairs, kind="stable")])
        parts = int(tiles[tiles[:, 5] == 0][:, 6][tiles[tiles[:, 5] == 0][:, 6] > 1].sum())
        step.tiles[group, window] = _Tiles(tiles, int(pairs.sum()), parts)
    return step.tiles[group, window]


def _kernel() -> Any:
    from headrace.models.attention import kernel

    return kernel


@functools.cache
def _worker(storage: str) -> Any:
    """The compiled worker; compiled code is kept beside the source or in the user's cache folder where either is writable."""
    try:
        return _kernel().compile_worker(storage, cache=True)
    except RuntimeError:  # numba found no folder to keep it in
        return _kernel().compile_worker(storage, cache=False)
