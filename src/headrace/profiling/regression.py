"""Least squares with coefficients of at least zero: what makes a fit monotone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]


def non_negative(matrix: Doubles, target: Doubles) -> Doubles:
    """The x >= 0 that minimises ``|matrix @ x - target|`` (active set method; Lawson and Hanson 1974, chapter 23).

    Args:
        matrix: float64[m, n].
        target: float64[m].

    Returns:
        float64[n]; where columns are dependent, one of the minimisers.
    """
    columns = matrix.shape[1]
    x = np.zeros(columns)
    free = np.zeros(columns, bool)
    scale = float(np.abs(matrix.T @ target).max(initial=0.0))
    tolerance = 1e-10 * max(scale, 1e-300)
    for _ in range(3 * columns):
        gradient = matrix.T @ (target - matrix @ x)
        gradient[free] = -np.inf
        enters = int(gradient.argmax())
        if gradient[enters] <= tolerance:
            break
        free[enters] = True
        x, moved = _descend(matrix, target, x, free)
        if not moved:  # rounding: the entering column left at once
            break
    return x


def _descend(matrix: Doubles, target: Doubles, x: Doubles, free: NDArray[np.bool_]) -> tuple[Doubles, bool]:
    """Solve over the free columns, fixing at zero those that would turn negative; ``free`` is updated."""
    before = x
    while free.any():
        solved = np.zeros_like(x)
        solved[free] = np.linalg.lstsq(matrix[:, free], target, rcond=None)[0]
        negative = free & (solved <= 0)
        if not negative.any():
            return solved, True
        room = x[negative] - solved[negative]
        step = float(np.min(x[negative] / np.where(room > 0, room, 1.0)))
        x = x + step * (solved - x)
        leaves = negative & (x <= 1e-12 * max(1.0, float(np.abs(x).max())))
        if not leaves.any():
            leaves = negative & (x == x[negative].min())
        x[leaves] = 0.0
        free &= ~leaves
    return x, not np.array_equal(x, before)
