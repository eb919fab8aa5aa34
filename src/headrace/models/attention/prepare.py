"""Fills the argument blocks of all layers for a step in one compiled call, because Python's share of a short step is its largest."""

# Numba marks few exports and compiles functions that type checkers see as plain Python.
# mypy: disable-error-code="no-untyped-call, no-any-return"

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numba import boolean, int32, int64, njit, types

from headrace.models.attention import tiles
from headrace.models.attention.worker import FIELDS

_plan: Any = njit(tiles.plan)
_join_keys: Any = njit(tiles.join_keys)

_INTS = int32[::1]
_SIGNATURE = types.UniTuple(int64, 7)(
    *[_INTS] * 9, int32[:, ::1], boolean[:, ::1], int64[::1], int64[:, ::1], int64[:, ::1], _INTS, int32[:, :, ::1]
)  # fmt: skip


def compile_prepare(*, cache: bool) -> Any:
    """The compiled function ``prepare`` below."""
    # Numba's cache knows a function by its own file and by what it encloses; the other files come in as the latter.
    sources = _digest()

    def prepare(
        ids: Any, positions: Any, writes: Any, queries: Any, contexts: Any, slots: Any, masks: Any, words: Any, wanted: Any,
        kinds: Any, skips: Any, kind_of: Any, blocks: Any, counters: Any, keys: Any, cuts: Any,
    ) -> Any:  # fmt: skip
        """Fields of ``blocks`` that a batch decides.

        Args:
            ids, positions, writes, queries, contexts, slots, masks, words, wanted: the arrays of a ``Batch``; ids, writes and
                wanted are looked at for their addresses alone.
            kinds: int32[kinds, 2], (head group, window) of layers that are cut alike.
            skips: bool[kinds, at least S], segments that the worker leaves out.
            kind_of: int64[layers].
            blocks: int64[layers, FIELDS].
            counters: int64[layers, 2], set to 0.
            keys: int32, room for all slots that are read.
            cuts: int32[kinds, n, 8], room for all tiles of each kind.

        Returns:
            The lowest and the highest slot that is read, the highest position, and where ids, positions, writes and wanted lie.
        """
        _ = sources
        _join_keys(contexts, queries, slots, writes, keys)
        count, segments = len(slots) + len(writes), len(queries) - 1
        low, high, farthest = 0, -1, 0
        for at in range(count):
            low, high = min(low, keys[at]), max(high, keys[at])
        for at in range(len(positions)):
            farthest = max(farthest, positions[at])
        made = np.empty((len(kinds), 2), np.int64)
        for kind in range(len(kinds)):
            found = _plan(queries, contexts, masks, positions, kinds[kind, 0], kinds[kind, 1], skips[kind])
            weights, parts = np.empty(len(found), np.int64), 0
            for i in range(len(found)):
                weights[i] = -np.int64(found[i, 2] - found[i, 1]) * np.int64(found[i, 4] - found[i, 3])
                parts += found[i, 6] > 1
            order = np.argsort(weights, kind="mergesort")
            for i in range(len(found)):
                cuts[kind, i] = found[order[i]]
            made[kind, 0], made[kind, 1] = len(found), parts
        for layer in range(len(blocks)):
            kind, block = kind_of[layer], blocks[layer]
            counters[layer] = 0
            block[6], block[7], block[8] = positions.ctypes.data, queries.ctypes.data, contexts.ctypes.data
            block[9], block[10], block[11] = keys.ctypes.data, masks.ctypes.data, words.ctypes.data
            block[12] = cuts.ctypes.data + kind * cuts.strides[0]
            block[16], block[22], block[23], block[25] = len(positions), segments, count, len(words)
            block[26], block[27], block[29] = made[kind, 0], made[kind, 1], kinds[kind, 1]
        addresses = ids.ctypes.data, positions.ctypes.data, writes.ctypes.data, wanted.ctypes.data
        return low, high, farthest, addresses[0], addresses[1], addresses[2], addresses[3]

    return njit(_SIGNATURE, cache=cache)(prepare)


def _digest() -> int:
    """A number that changes with the files this one is compiled from."""
    text = Path(str(tiles.__file__)).read_bytes() + str(FIELDS).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:4], "little")
