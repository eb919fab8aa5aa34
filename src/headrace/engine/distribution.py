"""From a row of logits to a token: weights, truncation (min-p, top-k, top-p) and the inverse of the cumulative distribution.

All functions take one row, so that a result cannot depend on the rest of the batch. Weights are float32, sums float64.
"Best first" means by weight, equal weights by ascending id: top-k 1 is therefore exactly greedy.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ids = NDArray[np.intp]

_BLOCK = 256
_SMALLEST = np.finfo(np.float32).smallest_subnormal


class Scratch:
    """Reused float32 workspace of a whole number of blocks; what lies beyond the vocabulary stays zero."""

    def __init__(self) -> None:
        self._data: Floats = np.zeros(0, np.float32)
        self._size = 0

    def take(self, size: int) -> tuple[Floats, Floats]:
        """Views of ``size`` floats and of the zero-padded whole; overwritten by the next call."""
        if size != self._size:
            self._data = np.zeros(-(-size // _BLOCK) * _BLOCK, np.float32)
            self._size = size
        return self._data[:size], self._data


def softmax_weights(row: Floats, peak: float, temperature: float, out: Floats) -> None:
    """Write ``exp((row - peak) / temperature)`` to ``out``; ``peak`` is the row's maximum, so the best weight is 1."""
    np.subtract(row, np.float32(peak), out=out)
    if temperature != 1.0:
        np.multiply(out, np.float32(1.0 / temperature), out=out)
    np.exp(out, out=out)


def draw(padded: Floats, u: float) -> int:
    """Inverse of the cumulative distribution in ascending order of ids.

    Args:
        padded: float32[m], m a multiple of the block size, not all zero; zeros are never drawn.
        u: uniform in [0, 1).

    Returns:
        The first id whose cumulative weight exceeds ``u`` times the total.
    """
    blocks = padded.reshape(-1, _BLOCK)
    ends = np.cumsum(blocks.sum(axis=1, dtype=np.float64))
    target = u * ends[-1]
    block = _first_above(ends, target)
    inside = np.cumsum(blocks[block], dtype=np.float64)
    if block:
        inside += ends[block - 1]
    return block * _BLOCK + _first_above(inside, target)


def draw_among(ids: Ids, weights: Floats, u: float) -> int:
    """:func:`draw` over candidates: ``ids`` ascending with positive ``weights``."""
    ends = np.cumsum(weights, dtype=np.float64)
    return int(ids[_first_above(ends, u * ends[-1])])


def _first_above(ends: Doubles, target: float) -> int:
    """Index of the first entry above ``target``; rounding between two sums can leave none, which means the last rise."""
    at = int(ends.searchsorted(target, side="right"))
    return at if at < len(ends) else int(ends.searchsorted(ends[-1], side="left"))


def truncate(weights: Floats, top_k: int, top_p: float, min_p: float) -> tuple[Ids, Floats]:
    """The candidates that min-p, top-k and top-p leave, applied in this order.

    Top-p keeps the fewest best candidates that hold at least ``top_p`` of the mass the two filters before it left.

    Args:
        weights: float32[V] with maximum 1.
        top_k: candidates to keep; 0 or -1 keeps all.
        top_p: mass to keep, in (0, 1].
        min_p: least weight as a share of the best.

    Returns:
        (ids ascending, their weights), all weights positive.
    """
    size = len(weights)
    floor = max(np.float32(min_p), _SMALLEST)
    limited = 0 < top_k < size
    if limited:
        floor = max(floor, np.partition(weights, size - top_k)[size - top_k])
    total = None
    if top_p < 1.0 and not limited and min_p == 0.0:
        # Ids at or below this weight hold at most 1 - top_p of the mass together: none is in the nucleus.
        total = float(weights.sum(dtype=np.float64))
        floor = max(floor, np.float32(total * (1.0 - top_p) / size * (1.0 - 1e-6)))
    ids = np.flatnonzero(weights >= floor)
    kept = weights[ids]
    if limited and len(ids) > top_k:
        ids, kept = _best(ids, kept, np.sort(kept)[::-1], top_k)
    if top_p < 1.0:
        ordered = np.sort(kept)[::-1]
        mass = np.cumsum(ordered, dtype=np.float64)
        needed = int(mass.searchsorted(top_p * (mass[-1] if total is None else total))) + 1
        ids, kept = _best(ids, kept, ordered, needed)
    return ids, kept


def _best(ids: Ids, weights: Floats, ordered: Floats, count: int) -> tuple[Ids, Floats]:
    """The ``count`` best of ``ids``, still ascending; ``ordered`` holds ``weights`` best first."""
    if count >= len(ids):
        return ids, weights
    last = ordered[count - 1]
    keep = weights > last
    keep[np.flatnonzero(weights == last)[: count - int(keep.sum())]] = True
    return ids[keep], weights[keep]
