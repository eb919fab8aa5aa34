"""How the Triton backend cuts a batch into tiles and parts: tables of numbers, no tensors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from headrace.core.batch import WORD_BITS, Batch, Ints

PART = 512  # context keys of a part: 8 K/V heads over 8k of context fill a large GPU with one sequence
ROWS = 64  # packed queries of a tile
NO_WINDOW = 1 << 30
LEAST = 16  # smallest side of a matrix product in Triton
TASK, MERGE = 11, 4


@dataclass(frozen=True, slots=True)
class Tables:
    """Tiles of one size.

    Attributes:
        tasks: int32[n, 11], parts as the kernel reads them: first row, rows, start of the segment's context, first and last key,
            first and last own row, start of the segment, start of its mask (-1: a chain), words of a mask row, and room for the
            part's sums (-1: none needed).
        merges: int32[m, 4], the tiles that have several parts: first row, rows, first room, parts.
        parts: rooms.
    """

    tasks: Ints
    merges: Ints
    parts: int


@dataclass(frozen=True, slots=True)
class Spare:
    """Sizes that batches are padded to: rows in all, and tasks, of which there is at least one a row."""

    rows: int
    tasks: int


def cut(batch: Batch, group: int, window: int | None) -> dict[int, Tables]:
    """Cut a batch into tiles by size and parts; how a segment is cut depends on that segment alone.

    Args:
        group: query heads per K/V head.
        window: keys a row sees at most; None for all.

    Returns:
        Tables by packed queries of a tile.
    """
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

    return {b: Tables(_table(t, TASK), _table(merges.get(b, []), MERGE), parts_of[b]) for b, t in tasks.items()}


def cut_small(batch: Batch, window: int | None, spare: Spare) -> Tables:
    """As :func:`cut` for a batch whose segments are one tile each, into tables of fixed size.

    What is left of the tables does nothing, and each row that pads the batch attends to itself, so that it holds numbers.

    Args:
        spare: the sizes to fill.
    """
    starts, rows = batch.query_starts[:-1], np.diff(batch.query_starts)
    held, masks = np.diff(batch.context_starts), np.diff(batch.mask_starts)
    low = np.minimum.reduceat(batch.positions, starts) - (NO_WINDOW if window is None else window) + 1
    first = np.clip(low, 0, held)
    counts = np.maximum(1, -(-(held - first) // PART))
    tasks, merges = np.zeros((spare.tasks, TASK), np.int32), np.zeros((spare.rows, MERGE), np.int32)
    tasks[:, 8] = tasks[:, 10] = -1
    at = np.repeat(np.arange(len(rows)), counts)  # the segment of each task
    ends = np.cumsum(counts)
    part = np.arange(len(at)) - (ends - counts)[at]
    final = part + 1 == counts[at]
    split = counts > 1
    rooms = np.cumsum(np.where(split, counts, 0)) - counts
    stops = starts + rows
    tasks[: len(at)] = np.stack(
        [
            starts[at],
            rows[at],
            batch.context_starts[at],
            first[at] + part * PART,
            np.where(final, held[at], first[at] + (part + 1) * PART),
            np.where(final, starts[at], stops[at]),
            stops[at],
            starts[at],
            np.where(masks[at] == 0, -1, batch.mask_starts[at]),
            (rows[at] + WORD_BITS - 1) // WORD_BITS,
            np.where(split[at], rooms[at] + part, -1),
        ],
        1,
    )
    padding = np.arange(batch.tokens, spare.rows)
    own = tasks[len(at) : len(at) + len(padding)]
    own[:, 0] = own[:, 5] = own[:, 7] = padding
    own[:, 1], own[:, 6] = 1, padding + 1
    merges[: split.sum()] = np.stack([starts[split], rows[split], rooms[split], counts[split]], 1)
    return Tables(tasks, merges, spare.tasks)


def parts_needed(batch: Batch) -> int:
    """Tasks of :func:`cut_small` without a window, padding rows left out; with one there are no more."""
    return int(np.maximum(1, -(-np.diff(batch.context_starts) // PART)).sum())


def _table(items: list[tuple[int, ...]], columns: int) -> Ints:
    return np.array(items, np.int32).reshape(-1, columns)


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def padded(n: int) -> int:
    """The side of a block that holds ``n`` numbers."""
    return max(LEAST, _power_of_two(n))
