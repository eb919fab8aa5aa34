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
from headrace.models.attention import dense, team, tiles
from headrace.models.attention.interface import AttentionBackend, AttentionStep, check_window
from headrace.models.attention.reference import ReferenceAttention, ReferenceStep
from headrace.models.attention.tiles import NO_WINDOW, PACKED, scratch_size

# Multiply-adds below which waking other threads costs more than it saves.
SERIAL = 1 << 18
STORAGE = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.int8: "int8"}


class Room:
    """A growing array whose address is kept, because asking numpy for one takes longer than a small kernel call."""

    def __init__(self, dtype: type) -> None:
        self._array: NDArray[Any] = np.zeros(1, dtype)
        self.address = self._array.ctypes.data

    def hold(self, size: int) -> int:
        """The address of at least ``size`` numbers; new ones are 0."""
        if size > len(self._array):
            self._array = np.zeros(size, self._array.dtype)
            self.address = self._array.ctypes.data
        return self.address


@dataclass(slots=True)
class _Cut:
    """The work of a step for one head group and window: tiles for the kernel (see ``tiles.plan``) and chunks for torch."""

    tiles: NDArray[np.int32]
    address: int
    window: int
    pairs: int  # (row, key) pairs
    parts: int  # room for partial sums
    chunks: list[dense.Chunk]


@dataclass(slots=True)
class NumbaStep(AttentionStep):
    """Key slots per segment, cuts per (head group, window), and what the fallback needs, made when it is needed.

    ``addresses`` are fields 6 to 11 of the kernel's argument block; ``top_slot`` is the highest slot read.
    """

    keys: NDArray[np.int32]
    addresses: tuple[int, ...]
    top_slot: int
    device: torch.device
    cuts: dict[tuple[int, int | None, bool], _Cut] = field(default_factory=dict)
    fallback: ReferenceStep | None = None


class NumbaAttention(AttentionBackend):
    """The CPU's fast path for float32, bfloat16 and int8 planes; float16 ones go to the reference.

    An instance keeps its scratch memory between calls, so it belongs to one thread at a time.
    """

    name: ClassVar[str] = "numba"

    def __init__(self) -> None:
        self._block = np.zeros(34, np.int64)
        self._counters = np.zeros(2, np.int64)
        self._numbers = np.zeros(2, np.float32)
        self._fixed = tuple(array.ctypes.data for array in (self._block, self._counters, self._numbers))
        self._partial = Room(np.float32)
        self._done = Room(np.int64)  # counters that rest at 0
        self._scratch = Room(np.float32)
        self._reference = ReferenceAttention()

    @staticmethod
    def problem(kind: str) -> str | None:
        if kind != "cpu":
            return "it works on the CPU only"
        if importlib.util.find_spec("numba") is None:
            return "numba is not installed (pip install numba)"
        return None

    def prepare(self, batch: Batch, device: torch.device) -> NumbaStep:
        keys = np.empty(len(batch.context_slots) + len(batch.write_slots), np.int32)
        starts = batch.context_starts, batch.query_starts
        compiled("join_keys")(*starts, batch.context_slots, batch.write_slots, keys)
        arrays = batch.positions, *starts[::-1], keys, batch.mask_starts, batch.mask_words
        addresses = tuple(array.ctypes.data for array in arrays)
        if len(keys) and keys.min() < 0:
            raise ValueError(f"slot {keys.min()} in the batch: slots start at 0")
        return NumbaStep(batch, keys, addresses, int(keys.max(initial=-1)), device)

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
        scales: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        storage = STORAGE.get(k_plane.dtype)
        if storage is None or not (k_plane.is_contiguous() and v_plane.is_contiguous()):
            if step.fallback is None:
                step.fallback = self._reference.prepare(step.batch, step.device)
            return self._reference.attend(
                q,
                k_plane,
                v_plane,
                step.fallback,
                scale=scale,
                window=window,
                softcap=softcap,
                sinks=sinks,
                scales=scales,
            )
        _check(q, k_plane, v_plane, step)
        _check_scales(k_plane, scales)
        heads = k_plane.shape[1]
        queries = q.detach().to(torch.float32).contiguous()
        extra = None if sinks is None else sinks.detach().to(torch.float32).contiguous()
        out = torch.empty(q.shape[0], q.shape[1], v_plane.shape[2])
        cut = cut_of(step, q.shape[1] // heads, window, plain=softcap is None and sinks is None)
        work = cut.pairs * q.shape[1] * q.shape[2]
        threads = 1 if work < SERIAL else min(torch.get_num_threads(), len(cut.tiles) * heads)
        self._numbers[0], self._numbers[1] = scale, softcap or 0.0
        self._counters.fill(0)
        self._fill(queries, k_plane, v_plane, scales, out, extra, step, cut, threads)
        if len(cut.tiles):
            team.run(compiled(storage).address, self._fixed[0], threads=threads)
        for chunk in cut.chunks:
            dense.attend(queries, k_plane, v_plane, out, chunk, scale, scales)
        return out if out.dtype == q.dtype else out.to(q.dtype)

    def _fill(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scales: tuple[torch.Tensor, torch.Tensor] | None,
        out: torch.Tensor,
        sinks: torch.Tensor | None,
        step: NumbaStep,
        cut: _Cut,
        threads: int,
    ) -> None:
        """Write the worker's argument block; its layout stands in ``worker``."""
        (slots, heads, dim), wide = k.shape, v.shape[2]
        packed = max(PACKED, q.shape[1] // heads)
        self._block[:] = (
            self._fixed[1],
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            out.data_ptr(),
            0 if sinks is None else sinks.data_ptr(),
            *step.addresses,
            cut.address,
            self._partial.hold(heads * cut.parts * packed * (wide + 2)),
            self._done.hold(heads * cut.parts),
            self._fixed[2],
            q.shape[0],
            q.shape[1],
            slots,
            heads,
            dim,
            wide,
            step.batch.segments,
            len(step.keys),
            0 if sinks is None else q.shape[1],
            len(step.batch.mask_words),
            len(cut.tiles),
            cut.parts,
            packed,
            cut.window,
            self._scratch.hold(threads * scratch_size(q.shape[1] // heads, dim, wide)),
            *((0, 0, 0) if scales is None else (scales[0].data_ptr(), scales[1].data_ptr(), slots)),
        )


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: NumbaStep) -> None:
    """Raise ValueError for sizes that would send the kernel outside of its arrays."""
    if q.shape[2] != k.shape[2] or q.shape[1] % k.shape[1] or v.shape[:2] != k.shape[:2]:
        raise ValueError(f"q {tuple(q.shape)}, K {tuple(k.shape)} and V {tuple(v.shape)} do not fit each other")
    if q.shape[0] != step.batch.tokens or step.top_slot >= k.shape[0]:
        raise ValueError(
            f"q has {q.shape[0]} rows and the planes {k.shape[0]} slots; the batch needs {step.batch.tokens} and {step.top_slot + 1}"
        )


def _check_scales(k: torch.Tensor, scales: tuple[torch.Tensor, torch.Tensor] | None) -> None:
    """Raise ValueError unless int8 planes, and they alone, come with a float32 scale for every slot and head."""
    if (k.dtype is torch.int8) is not (scales is not None):
        raise ValueError(f"{k.dtype} planes {'without' if scales is None else 'with'} scales")
    for scale in scales or ():
        if scale.shape != k.shape[:2] or scale.dtype is not torch.float32 or not scale.is_contiguous():
            raise ValueError(f"scales are float32{list(k.shape[:2])}, not {scale.dtype} {list(scale.shape)}")


def cut_of(step: NumbaStep, group: int, window: int | None, *, plain: bool) -> _Cut:
    """The work for a head group and window, tiles largest first so that threads finish together.

    Only ``plain`` attention, without soft cap and sinks, can leave chunks to torch.
    """
    key = (group, window, plain)
    if key not in step.cuts:
        check_window(window)
        batch, width = step.batch, NO_WINDOW if window is None else window
        skip = dense.is_dense(batch, window) & plain
        starts = batch.query_starts, batch.context_starts, batch.mask_starts
        made = compiled("plan")(*starts, batch.positions, group, width, skip)
        pairs = (made[:, 2] - made[:, 1]).astype(np.int64) * (made[:, 4] - made[:, 3])
        made = np.ascontiguousarray(made[np.argsort(-pairs, kind="stable")])
        parts = int((made[:, 6] > 1).sum())
        chunks = dense.chunks(batch, skip, window)
        step.cuts[key] = _Cut(made, made.ctypes.data, width, int(pairs.sum()), parts, chunks)
    return step.cuts[key]


@functools.cache
def compiled(name: str) -> Any:
    """A compiled function: "plan" and "join_keys" of ``tiles``, "prepare", or the worker for "float32", "bfloat16" or "int8" planes.

    The code is kept beside the source, else in the user's cache folder, by numba; where neither can be written it is compiled anew.
    """
    import numba

    from headrace.models.attention.prepare import compile_prepare
    from headrace.models.attention.worker import compile_worker

    def build(cache: bool) -> Any:
        if name in STORAGE.values():
            return compile_worker(name, cache=cache)
        if name == "prepare":
            return compile_prepare(cache=cache)
        return numba.njit(getattr(tiles, name), cache=cache)

    try:
        return build(cache=True)
    except RuntimeError:  # "no locator available": no folder to keep it in
        return build(cache=False)
