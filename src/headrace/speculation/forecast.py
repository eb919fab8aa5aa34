"""What each depth of drafting promises, before there is a draft to look at."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from headrace.core.speculation import Floats
from headrace.speculation.pace import share_met
from headrace.speculation.select import ladder


class Forecast:
    """Steps that verify chains of every depth up to D, each as large as yields the most tokens a millisecond.

    Args:
        chances: float64[D, R], chance of each request's chain to be accepted to each depth (1 first).
        drafting: float64[D + 1], milliseconds to draft to each depth (0 first).
        milliseconds: the target's pass with so many nodes in it.
        room: nodes that fit the step.

    Attributes:
        reach: float64[D + 1, R], tokens each request may expect at each depth.
        rate: float64[D + 1], tokens a millisecond.
        took: float64[D + 1], milliseconds of the step.
    """

    def __init__(self, chances: Floats, drafting: Floats, milliseconds: Callable[[int], float], room: int) -> None:
        deepest, count = chances.shape
        self._drafting = drafting
        self._sizes = np.array(ladder(0, max(0, min(room, deepest * count))))
        self._passes = np.array([milliseconds(int(size)) for size in self._sizes])
        self.reach: Floats = np.concatenate([np.ones((1, count)), 1.0 + np.cumsum(chances, axis=0)])
        best = np.argsort(-chances.ravel())
        layers, gains = best // max(count, 1), chances.ravel()[best]
        # One row for each depth: the nodes it has, likeliest first, and those it has not at a gain of nothing.
        has = layers[None, :] < np.arange(deepest + 1)[:, None]
        nodes = np.concatenate([np.zeros((deepest + 1, 1), np.int64), np.cumsum(has, axis=1)], axis=1)
        tokens = count + np.concatenate([np.zeros((deepest + 1, 1)), np.cumsum(has * gains, axis=1)], axis=1)
        spent = drafting[:, None] + np.interp(nodes, self._sizes, self._passes)
        yields = np.where(nodes <= self._sizes[-1], tokens / spent, 0.0)
        place = yields.argmax(axis=1)[:, None]
        self.rate: Floats = np.take_along_axis(yields, place, 1)[:, 0]
        self.took: Floats = np.take_along_axis(spent, place, 1)[:, 0]

    def kept(self, speed: Floats, counted: NDArray[np.bool_]) -> Floats:
        """float64[D + 1]: how near the ``counted`` requests come to the tokens a millisecond they need, 1 each at most, summed.

        Of two steps the better one counts: the one that yields most, with nodes for those behind on top, and the one that holds
        nothing but those.
        """
        most = np.zeros(len(self.rate))
        for took in (self.took, self._drafting + self._passes[0]):
            for _ in range(2):
                took = np.maximum(
                    took, self._drafting + np.interp(self._owed(speed, took, counted), self._sizes, self._passes)
                )
            most = np.maximum(most, share_met(self.reach, speed[None, :] * took[:, None], counted))
        return most

    def _owed(self, speed: Floats, took: Floats, counted: NDArray[np.bool_]) -> Floats:
        """float64[D + 1]: nodes that keep the ``counted`` on their pace in steps of ``took`` milliseconds, as far as the depth goes."""
        short = self.reach[None, :-1, :] < (speed[None, :] * took[:, None])[:, None, :]  # [depth, nodes, request]
        within = np.arange(len(took) - 1)[None, :] < np.arange(len(took))[:, None]
        return np.asarray((short & within[:, :, None])[:, :, counted].sum(axis=(1, 2)), np.float64)

    def hopeless(self, speed: Floats) -> NDArray[np.bool_]:
        """bool[R]: who would be too late at every depth."""
        return np.asarray((self.reach < speed[None, :] * self.took[:, None]).all(axis=0))
