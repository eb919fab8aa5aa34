"""How the CPU backend cuts a batch into tiles of query rows and parts of key ranges; compiled by numba.

How a segment is cut depends on that segment alone, hence its rows come out the same, to the bit, in any batch.
"""

from __future__ import annotations

from typing import Any

import numpy as np

PART = 2048  # keys of a part
PACKED = 64  # packed queries of a tile, at most (one row with more query heads per K/V head may exceed it)
BLOCK = 64  # keys whose scores are held at once
NO_WINDOW = 1 << 30


def scratch_size(group: int, dim: int, wide: int) -> int:
    """float32 numbers of scratch memory per thread, for ``group`` query heads per K/V head, keys of ``dim`` and values of ``wide``."""
    size = max(PACKED, group)
    return size * (dim + BLOCK + wide + 2) + BLOCK * (dim + wide)


def join_keys(contexts: Any, queries: Any, slots: Any, writes: Any, keys: Any) -> None:
    """Fill ``keys`` with each segment's context slots followed by its own."""
    at = 0
    for s in range(len(queries) - 1):
        for j in range(contexts[s], contexts[s + 1]):
            keys[at] = slots[j]
            at += 1
        for j in range(queries[s], queries[s + 1]):
            keys[at] = writes[j]
            at += 1


def plan(
    queries: Any, contexts: Any, masks: Any, positions: Any, group: int, window: int, skip: Any
) -> Any:  # fmt: skip
    """Cut a batch into tiles and parts, once per step for each head group and window among the layers.

    Args:
        queries, contexts, masks, positions: of the batch.
        group: query heads per K/V head.
        window: keys a row sees at most; ``NO_WINDOW`` for all.
        skip: bool[S], segments to leave out.

    Returns:
        int32[n, 8]: segment, first and last row, first and last key (of context then own rows), number of the part, number of
        parts, and where in the room for partial sums the tile's first part stands.
    """
    rows_most = max(1, PACKED // group)
    limit = 0
    for s in range(len(queries) - 1):
        rows, held = queries[s + 1] - queries[s], contexts[s + 1] - contexts[s]
        limit += (rows + rows_most - 1) // rows_most + (held + rows) // PART
    tiles = np.empty((limit, 8), np.int32)
    count, room = 0, 0
    for s in range(len(queries) - 1):
        if skip[s]:
            continue
        start, stop, held = queries[s], queries[s + 1], contexts[s + 1] - contexts[s]
        for first in range(start, stop, rows_most):
            last = min(first + rows_most, stop)
            low = positions[first:last].min() - window + 1
            key = min(max(low, 0), held)
            if key == held and masks[s] == masks[s + 1]:
                while positions[start + key - held] < low:
                    key += 1
            end = held + last - start
            parts = (end - key + PART - 1) // PART if stop - start <= rows_most else 1
            for part in range(parts):
                upto = min(key + (part + 1) * PART, end) if part + 1 < parts else end
                tiles[count] = (s, first, last, key + part * PART, upto, part, parts, room)
                count += 1
            if parts > 1:
                room += parts
    return tiles[:count]
