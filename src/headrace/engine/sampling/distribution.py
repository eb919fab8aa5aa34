"""From a row of logits to a token: weights, truncation (min-p, top-k, top-p) and the inverse of the cumulative distribution.

All functions take one row, so that a result cannot depend on the rest of the batch. Weights are float32, sums float64.
"Best first" means by weight, equal weights by ascending id: top-k 1 is therefore exactly greedy.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

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


def _first_above(ends: Doubles, target: float) -> int:
    """Index of the first entry above ``target``; rounding between two sums can leave none, which means the last rise."""
    at = int(ends.searchsorted(target, side="right"))
    return at if at < len(ends) else int(ends.searchsorted(ends[-1], side="left"))


def truncate(weights: Floats, top_k: int, top_p: float, min_p: float) -> None:
    """Set the weights that min-p, top-k and top-p remove (applied in this order) to zero, in place.

    Top-p keeps the fewest best candidates that hold at least ``top_p`` of the mass the two filters before it left.

    Args:
        weights: float32[V] with maximum 1.
        top_k: candidates to keep; 0 or -1 keeps all.
        top_p: mass to keep, in (0, 1].
        min_p: least weight as a share of the best.
    """
    size = len(weights)
    floor = max(np.float32(min_p), _SMALLEST)
    if 0 < top_k < size:
        best = np.partition(weights, size - top_k)[size - top_k :]
        best = best[best >= floor]
        count = len(best)
        if top_p < 1.0:
            best.sort()
            count -= _tail(best, float(best.sum(dtype=np.float64)), top_p)
            _keep(weights, best[len(best) - count], count)
        else:
            _keep(weights, best.min(), count)
    elif top_p < 1.0:
        ordered, total = _candidates(weights, floor, top_p, min_p)
        count = len(ordered) - _tail(ordered, total, top_p)
        _keep(weights, ordered[len(ordered) - count], count)
    else:
        _zero_below(weights, floor)


def _candidates(weights: Floats, floor: np.float32, top_p: float, min_p: float) -> tuple[Floats, float]:
    """The weights among which top-p's border lies, ascending, and the mass it is a share of.

    Ids with at most ``(1 - top_p) / V`` of the mass hold at most ``1 - top_p`` of it together, so none is in the nucleus:
    usually few of a large vocabulary remain to be sorted.
    """
    total = None
    if min_p == 0.0:
        total = float(weights.sum(dtype=np.float64))
        floor = max(floor, np.float32(total * (1.0 - top_p) / len(weights) * (1.0 - 1e-6)))
    above = weights >= floor
    if total is not None and 2 * int(np.count_nonzero(above)) > len(weights):
        ordered = weights.copy()
    else:
        ordered = weights.take(np.flatnonzero(above))  # several times faster than weights[above]
    if total is None:
        total = float(ordered.sum(dtype=np.float64))
    ordered.sort()
    return ordered, total


def _tail(ordered: Floats, total: float, top_p: float) -> int:
    """How many of the smallest candidates lie outside the nucleus.

    Args:
        ordered: float32[c] ascending, c > 0; what is missing from it below belongs to the tail too.
        total: the mass of all candidates, the missing ones included.
        top_p: share to keep.
    """
    spare = total * (1.0 - top_p) - (total - float(ordered.sum(dtype=np.float64)))
    whole = len(ordered) // _BLOCK * _BLOCK
    ends = np.cumsum(ordered[:whole].reshape(-1, _BLOCK).sum(axis=1, dtype=np.float64))
    block = int(ends.searchsorted(spare, side="right"))
    inside = np.cumsum(ordered[block * _BLOCK : (block + 1) * _BLOCK], dtype=np.float64)
    if block:
        inside += ends[block - 1]
    tail = block * _BLOCK + int(inside.searchsorted(spare, side="right"))
    return min(tail, len(ordered) - 1)


def _keep(weights: Floats, last: np.float32, count: int) -> None:
    """Zero all but the ``count`` best weights, the smallest of which is ``last``, in place."""
    surplus = _zero_below(weights, last) - count
    if surplus > 0:
        weights[np.flatnonzero(weights == last)[-surplus:]] = 0.0


def _zero_below(weights: Floats, floor: np.float32) -> int:
    """Zero the weights below ``floor`` in place; how many are left."""
    above = weights >= floor
    np.multiply(weights, above, out=weights)  # ten times faster than an assignment through a mask
    return int(np.count_nonzero(above))
