# Numba marks few exports.
# mypy: disable-error-code="no-untyped-call"
"""Search on the CPU, compiled by numba: joint cells for short codes, a scan for long ones, and the k best of either.

*Joint cells.* With m * b <= 14 bits a key's whole code is one of few cells, and all keys of a cell have the same score. So scores,
softmax and group sum are computed per cell, with the number of its keys as weight, and keys are taken cell by cell, best cell
first, until there are k: exactly what a scan over all keys selects, at a cost that does not grow with their number (sheet section 10).

Keys of a cell are found through a list sorted by cell; those appended since it was sorted stand behind it in a short tail.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from headrace.models.attention.numerics import exp

BINS = 1 << 12
SHIFT = 31 - 12  # leaves a positive float32's exponent and 4 bits of its fraction
LEAST = np.float32(-1e30)


@njit
def join_codes(codes: Any, bits: int, cells: Any) -> None:
    """The cell of every key: codes [m, n] of ``bits`` bits each, the first lowest, to int32[n]."""
    for t in range(codes.shape[1]):
        cell = np.int32(0)
        for m in range(codes.shape[0]):
            cell |= np.int32(codes[m, t]) << np.int32(bits * m)
        cells[t] = cell


@njit
def sort_cells(cells: Any, first: int, starts: Any, order: Any) -> None:
    """Counting sort of the keys from ``first`` on: ``order`` gets those of cell c, oldest first, at [starts[c], starts[c + 1])."""
    starts[:] = 0
    for cell in cells[first:]:
        starts[cell + 1] += 1
    for cell in range(len(starts) - 1):
        starts[cell + 1] += starts[cell]
    place = starts[:-1].copy()
    for t in range(first, len(cells)):
        order[place[cells[t]]] = t
        place[cells[t]] += 1


@njit(fastmath=True)
def cell_scores(table: Any, scores: Any) -> None:
    """Scores of all cells from the products of one query: float32[m, C] to float32[C ** m]."""
    runs, count = table.shape
    for c in range(count):
        scores[c] = table[0, c]
    size = count
    for m in range(1, runs):
        for high in range(count - 1, -1, -1):  # downwards: the first block is read until the last round
            more = table[m, high]
            at = high * size
            for low in range(size):
                scores[at + low] = scores[low] + more
        size *= count


@njit(fastmath=True)
def token_scores(table: Any, codes: Any, scores: Any) -> None:
    """Scores of all keys from the products of one query: float32[m, C] and codes [m, n] to float32[n]."""
    for t in range(codes.shape[1]):
        scores[t] = table[0, codes[0, t]]
    for m in range(1, codes.shape[0]):
        row = table[m]
        for t in range(codes.shape[1]):
            scores[t] += row[codes[m, t]]


@njit(fastmath=True)
def add_softmax(scores: Any, counts: Any, weights: Any) -> float:
    """Add the softmax of ``scores`` [n], items counted ``counts`` [n] times, to ``weights`` [n]; an item's weight is that of one of
    its keys. Gives back the logarithm of the softmax's denominator.
    """
    most = LEAST
    for i in range(len(scores)):
        most = max(most, scores[i] if counts[i] > 0 else LEAST)
    total = 0.0
    for i in range(len(scores)):
        scores[i] = exp(scores[i] - most) if counts[i] > 0 else np.float32(0)
    for i in range(len(scores)):
        total += scores[i] * counts[i]
    share = np.float32(1.0 / total)
    for i in range(len(scores)):
        weights[i] += scores[i] * share
    return float(most + np.log(total))


@njit
def bar_of(weights: Any, counts: Any, k: int, bins: Any) -> tuple[int, int]:
    """The histogram bin in which the k-th best key lies, and how many keys lie in higher bins.

    Bits of positive floats are in the order of their values, so the leading ones are bins of a fixed relative width.
    """
    bins[:] = 0
    bits = weights.view(np.int32)
    for i in range(len(bits)):
        bins[bits[i] >> SHIFT] += counts[i]
    above, place = 0, len(bins) - 1
    while place > 0 and above + bins[place] < k:
        above += bins[place]
        place -= 1
    return place, above


@njit
def take_cells(
    weights: Any, starts: Any, order: Any, tail: Any, base: int, k: int, counts: Any, bins: Any, out: Any
) -> int:
    """The ``k`` best keys by the weights of their cells, the newest of a cell first, into ``out``; returns how many.

    Args:
        starts, order: of :func:`sort_cells`.
        tail: cells of the keys from ``base`` on, which are not sorted yet.
        counts: int32[cells], keys of each cell, tail included.
    """
    bar, _ = bar_of(weights, counts, k, bins)
    bits = weights.view(np.int32)
    found = 0
    for t in range(len(tail)):
        if bits[tail[t]] >> SHIFT > bar:
            out[found] = base + t
            found += 1
    for cell in range(len(weights)):
        if bits[cell] >> SHIFT > bar:
            for at in range(starts[cell], starts[cell + 1]):
                out[found] = order[at]
                found += 1
    return int(fill_cells(weights, starts, order, tail, base, k, counts, bar, found, out))


@njit
def fill_cells(
    weights: Any, starts: Any, order: Any, tail: Any, base: int, k: int, counts: Any, bar: int, found: int, out: Any
) -> int:
    """Fill up to ``k`` from the cells whose weights fall into bin ``bar``, best cell first."""
    bits = weights.view(np.int32)
    edge = np.empty(len(weights), np.int32)
    size = 0
    for cell in range(len(weights)):
        if counts[cell] > 0 and bits[cell] >> SHIFT == bar:
            edge[size] = cell
            size += 1
    chosen = edge[:size]
    for cell in chosen[np.argsort(-weights[chosen], kind="mergesort")]:
        for t in range(len(tail) - 1, -1, -1):
            if tail[t] == cell and found < k:
                out[found] = base + t
                found += 1
        for at in range(starts[cell + 1] - 1, starts[cell] - 1, -1):
            if found < k:
                out[found] = order[at]
                found += 1
        if found >= k:
            break
    return found


@njit
def take_tokens(weights: Any, first: int, k: int, bins: Any, out: Any) -> int:
    """The ``k`` best keys from ``first`` on by their own weights, into ``out``; returns how many."""
    part = weights[first:]
    bar, _ = bar_of(part, np.ones(len(part), np.int32), k, bins)
    bits = part.view(np.int32)
    found, size = 0, 0
    edge = np.empty(len(part), np.int32)
    for t in range(len(part)):
        place = bits[t] >> SHIFT
        if place > bar:
            out[found] = first + t
            found += 1
        elif place == bar:
            edge[size] = t
            size += 1
    chosen = edge[:size][::-1]  # newest first, which a stable sort keeps among equals
    for t in chosen[np.argsort(-part[chosen], kind="mergesort")]:
        if found == k:
            break
        out[found] = first + t
        found += 1
    return found


@njit
def search_cells(
    tables: Any, starts: Any, order: Any, tail: Any, base: int, counts: Any, k: int, scores: Any, weights: Any,
    bins: Any, out: Any, sums: Any,
) -> int:  # fmt: skip
    """Selection of one row by cells; see :func:`take_cells`.

    Args:
        tables: float32[G, m, C], scaled products of each query head with the centroids.
        scores, weights: float32[cells], scratch.
        sums: float32[G], gets the logarithm of each head's softmax denominator.
    """
    weights[:] = 0
    for g in range(tables.shape[0]):
        cell_scores(tables[g], scores)
        sums[g] = add_softmax(scores, counts, weights)
    return int(take_cells(weights, starts, order, tail, base, k, counts, bins, out))


@njit
def search_tokens(
    tables: Any, codes: Any, first: int, ones: Any, k: int, scores: Any, weights: Any, bins: Any, out: Any, sums: Any
) -> int:
    """Selection of one row by a scan of the codes [m, n] from key ``first`` on; ``ones`` int32[n] are ones, the rest as above."""
    weights[:] = 0
    for g in range(tables.shape[0]):
        token_scores(tables[g], codes, scores)
        sums[g] = add_softmax(scores[first:], ones[first:], weights[first:])
    return int(take_tokens(weights, first, k, bins, out))
