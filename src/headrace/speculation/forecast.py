"""What each depth of drafting promises, before there is a draft to look at."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from headrace.core.speculation import Floats
from headrace.speculation.pace import share_met


class Forecast:
    """Steps that verify chains of every depth up to D, each as large as yields the most tokens a millisecond.

    Args:
        chances: float64[D, R], chance of each request's chain to be accepted to each depth (1 first).
        drafting: float64[D + 1], milliseconds to draft to each depth (0 first).
        passes: float64[N + 1], milliseconds of the target's pass with 0, 1, ... N nodes in it; more do not fit.

    Attributes:
        reach: float64[D + 1, R], tokens each request may expect at each depth.
        rate: float64[D + 1], tokens a millisecond.
        took: float64[D + 1], milliseconds of the step.
    """

    def __init__(self, chances: Floats, drafting: Floats, passes: Floats) -> None:
        deepest, count = chances.shape
        self._drafting, self._passes = drafting, passes
        self.reach: Floats = np.empty((deepest + 1, count))
        self.reach[0] = 1.0
        np.cumsum(chances, axis=0, out=self.reach[1:])
        self.reach[1:] += 1.0
        flat = chances.ravel()
        best = (-flat).argsort()
        # One row for each depth: the nodes it has, likeliest first, and those it has not at a gain of nothing.
        has = best // max(count, 1) < np.arange(deepest + 1)[:, None]
        nodes = np.zeros((deepest + 1, len(flat) + 1), np.int64)
        np.cumsum(has, axis=1, out=nodes[:, 1:])
        tokens = np.full((deepest + 1, len(flat) + 1), float(count))
        tokens[:, 1:] += np.cumsum(has * flat[best], axis=1)
        spent = drafting[:, None] + passes[np.minimum(nodes, len(passes) - 1)]
        yields = tokens / spent
        yields[nodes >= len(passes)] = 0.0
        place, rows = yields.argmax(axis=1), np.arange(deepest + 1)
        self.rate: Floats = yields[rows, place]
        self.took: Floats = spent[rows, place]

    def keeps_all(self, depth: int, speed: Floats, counted: NDArray[np.bool_]) -> bool:
        """Whether at ``depth`` all the ``counted`` requests get the tokens a millisecond they need: :meth:`kept` for one depth."""
        took, speed, reach = self.took[depth], speed[counted], self.reach[: depth + 1, counted]
        for _ in range(2):
            owed = int((reach[:-1] < speed * took).sum())
            took = max(took, self._drafting[depth] + self._passes[min(owed, len(self._passes) - 1)])
        return bool((reach[-1] >= speed * took).all())

    def kept(self, speed: Floats, counted: NDArray[np.bool_]) -> Floats:
        """float64[D + 1]: how near the ``counted`` requests come to the tokens a millisecond they need, 1 each at most, summed.

        Of two steps the better one counts: the one that yields most, with nodes for those behind on top, and the one that holds
        nothing but those.
        """
        most = np.zeros(len(self.rate))
        for took in (self.took, self._drafting + self._passes[0]):
            for _ in range(2):
                owed = np.minimum(self._owed(speed, took, counted), len(self._passes) - 1)
                took = np.maximum(took, self._drafting + self._passes[owed])
            most = np.maximum(most, share_met(self.reach, speed[None, :] * took[:, None], counted))
        return most

    def _owed(self, speed: Floats, took: Floats, counted: NDArray[np.bool_]) -> NDArray[np.int64]:
        """int64[D + 1]: nodes that keep the ``counted`` on their pace in steps of ``took`` milliseconds, as far as the depth goes."""
        short = self.reach[None, :-1, :] < (speed[None, :] * took[:, None])[:, None, :]  # [depth, nodes, request]
        within = np.arange(len(took) - 1)[None, :] < np.arange(len(took))[:, None]
        return np.asarray((short & within[:, :, None])[:, :, counted].sum(axis=(1, 2)), np.int64)

    def hopeless(self, speed: Floats) -> NDArray[np.bool_]:
        """bool[R]: who would be too late at every depth."""
        return np.asarray((self.reach < speed[None, :] * self.took[:, None]).all(axis=0))
