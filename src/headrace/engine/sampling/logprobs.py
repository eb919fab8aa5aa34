"""Log-probabilities of raw logits."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from headrace.core.outputs import TokenLogprobs
from headrace.engine.sampling.distribution import Floats


def token_logprobs(row: Floats, token: int, count: int) -> TokenLogprobs:
    """The log-probability and rank of ``token``, and the ``count`` most likely tokens beside it.

    Args:
        row: float32[V] raw logits, free of NaN and with a finite maximum.
        token: the chosen id.
        count: alternatives wanted, cut to V.

    Returns:
        Values in natural logarithm, summed in float64; ``rank`` is 1 plus the number of strictly larger logits.
    """
    peak = row.max()
    norm = float(peak) + math.log(np.exp(row - peak).sum(dtype=np.float64))
    chosen = row[token]
    top = tuple((int(i), float(row[i]) - norm) for i in best(row, count)) if count else ()
    return TokenLogprobs(token, float(chosen) - norm, 1 + int(np.count_nonzero(row > chosen)), top)


def best(row: Floats, count: int) -> NDArray[np.intp]:
    """Ids of the ``count`` largest entries, largest first, equal ones by ascending id."""
    size = len(row)
    count = min(count, size)
    ids = np.flatnonzero(row >= np.partition(row, size - count)[size - count])
    return ids[np.lexsort((ids, -row[ids]))[:count]]
