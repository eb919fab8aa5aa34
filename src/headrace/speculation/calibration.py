"""What a draft's confidence is worth, learnt online: a logistic regression for each source and an offset for each request.

The log odds that a node is accepted once its parent is are taken as ``slope * x + bias + offset of the request``,
where x are the log odds the drafter states. Slope and bias belong to the source, and are learnt by every
verification; the offset makes up for texts that are harder or easier than the draft believes. Both are updated
observation by observation by Newton steps on the posterior (the extended Kalman filter of logistic regression), which
needs no learning rate; old evidence fades.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from headrace.core.speculation import ROOT, DraftTree, Floats

_EDGE = 0.005
"""Probabilities are kept this far from 0 and 1: nothing a draft says is certain."""

_NEWS, _DOUBT = 0.02, 5.0
"""Share of the mean curve that every draft replaces, and how many drafts the curve before the first one is worth."""

_NEARLY = 0.9
"""A layer that is not drafted holds at least so much of the chance that the one above it gives."""


@dataclass(slots=True)
class _Source:
    """What is known of a source.

    Attributes:
        slope, bias, var_slope, var_bias, cov: posterior of the regression: means, variances and what they share.
        rate: mean acceptance of first choices once their parents are.
        curve: mean chance of the best node of each layer.
        seen: drafts in that mean.
    """

    slope: float = 1.0
    bias: float = 0.0
    var_slope: float = 0.1
    var_bias: float = 0.5
    cov: float = 0.0
    rate: float = 0.7
    curve: Floats = field(default_factory=lambda: 0.7 ** np.arange(1.0, 5.0))
    seen: int = 0

    def see(self, paths: Floats) -> None:
        """Take a draft's chances, by depth, into the mean curve. Drafts count whether they are verified or not.

        Layers that were not drafted are taken to be hardly worse than the last ones that were, so that drafts which got better are made
        deeper again.
        """
        if len(paths) > len(self.curve):
            more = self.curve[-1] * (self.curve[-1] / self.curve[-2]) ** np.arange(1, len(paths) - len(self.curve) + 1)
            self.curve = np.concatenate([self.curve, more])
        count = len(paths)
        self.seen += 1
        self.curve[:count] += max(_NEWS, 1.0 / (self.seen + _DOUBT)) * (paths - self.curve[:count])
        if count < len(self.curve):
            last, before = self.curve[count - 1], self.curve[count - 2] if count > 1 else 1.0
            least = last * (_NEARLY * last / before) ** np.arange(1, len(self.curve) - count + 1)
            np.maximum(self.curve[count:], least, out=self.curve[count:])


@dataclass(slots=True)
class _Request:
    """Posterior of a request's offset, and its mean acceptance so far."""

    offset: float = 0.0
    variance: float = 0.4
    hits: float = 0.0
    tries: float = 0.0


class OnlineCalibration:
    """Conforms to :class:`headrace.core.speculation.Calibration`.

    Args:
        fade: share of the evidence that each observation of a source leaves.
        patience: observations that the source's mean counts for in a request's expected rate.
    """

    def __init__(self, fade: float = 0.9995, patience: float = 6.0) -> None:
        self._fade, self._patience = fade, patience
        self._sources: dict[str, _Source] = {}
        self._requests: dict[tuple[int, str], _Request] = {}

    def survival(self, sequences: Sequence[int], source: str, depth: int) -> Floats:
        """The source's mean curve, raised to the power that makes its mean acceptance the request's own."""
        known = self._source(source)
        curve = known.curve
        if len(curve) < depth:  # deeper than any draft so far: as from the layer before
            last = curve[-1] / curve[-2]
            curve = np.concatenate([curve, curve[-1] * last ** np.arange(1, depth - len(curve) + 1)])
        mean = min(max(known.rate, 0.01), 0.99)
        powers = np.ones(len(sequences))
        for place, sequence in enumerate(sequences):
            mine = self._requests.get((sequence, source))
            if mine is not None:
                own = (mine.hits + self._patience * mean) / (mine.tries + self._patience)
                powers[place] = math.log(min(own, 0.99)) / math.log(mean)
        return np.asarray(curve[:depth, None] ** powers[None, :])

    def calibrated(self, sequence: int, tree: DraftTree) -> DraftTree:
        """``tree`` with corrected probabilities; siblings that would exceed 1 together are scaled down."""
        source, mine = self._source(tree.source), self._requests.get((sequence, tree.source))
        if not len(tree):  # nothing to offer is a chance of nothing
            source.see(np.zeros(len(source.curve)))
            return tree
        offset = source.bias + (mine.offset if mine else 0.0)
        given = 1.0 / (1.0 + np.exp(-(source.slope * log_odds(tree.conditionals) + offset)))
        if tree.is_chain:
            paths = np.cumprod(given, dtype=np.float64)
            source.see(paths)
            return replace(tree, probabilities=paths)
        together = np.bincount(tree.parents + 1, weights=given, minlength=len(tree) + 1)
        given /= np.maximum(together, 1.0)[tree.parents + 1]
        paths = given
        for layer in range(2, int(tree.depths.max()) + 1):  # layers above are final by then
            rows = np.flatnonzero(tree.depths == layer)
            paths[rows] *= paths[tree.parents[rows]]
        best = np.zeros(int(tree.depths.max()))
        np.maximum.at(best, tree.depths - 1, paths)
        source.see(best)
        return replace(tree, probabilities=paths)

    def observe(self, sequence: int, tree: DraftTree, accepted: Sequence[int]) -> None:
        """Learn from every node whose parent was accepted: its own fate was open."""
        source = self._source(tree.source)
        mine = self._requests.setdefault((sequence, tree.source), _Request())
        won = set(accepted)
        reached = won | {ROOT}
        odds = log_odds(tree.conditionals).tolist()
        for node, parent in enumerate(tree.parents.tolist()):
            if parent in reached:
                self._learn(source, mine, odds[node], node in won)
        # The first choice of each accepted node, for the rate: what a chain would have met.
        for parent in reached:
            children = np.flatnonzero(tree.parents == parent)
            if len(children):
                first = float(int(children[0]) in won)
                mine.hits, mine.tries = 0.97 * mine.hits + first, 0.97 * mine.tries + 1.0
                source.rate += 0.002 * (first - source.rate)

    def forget(self, sequence: int) -> None:
        """The sequence has ended."""
        for name in self._sources:
            self._requests.pop((sequence, name), None)

    def _source(self, name: str) -> _Source:
        return self._sources.setdefault(name, _Source())

    def _learn(self, source: _Source, mine: _Request, x: float, accepted: bool) -> None:
        z = source.slope * x + source.bias + mine.offset
        p = 1.0 / (1.0 + math.exp(-max(-30.0, min(30.0, z))))
        surprise, weight = float(accepted) - p, max(p * (1.0 - p), 1e-3)
        toward_slope = source.var_slope * x + source.cov
        toward_bias = source.cov * x + source.var_bias
        gain = weight / (1.0 + weight * (toward_slope * x + toward_bias))
        var_slope = (source.var_slope - gain * toward_slope**2) / self._fade
        var_bias = (source.var_bias - gain * toward_bias**2) / self._fade
        kept = min(1.0, 0.1 / var_slope, 0.5 / var_bias)  # never less sure than at first
        source.var_slope, source.var_bias = kept * var_slope, kept * var_bias
        source.cov = kept * (source.cov - gain * toward_slope * toward_bias) / self._fade
        share = gain / weight * surprise
        source.slope = min(3.0, max(0.1, source.slope + toward_slope * share))
        source.bias += toward_bias * share
        variance = mine.variance / (1.0 + weight * mine.variance)
        mine.offset += variance * surprise
        mine.variance = variance + 0.002  # texts change: the offset is never known for good


def log_odds(probabilities: Floats) -> Floats:
    """float64[m] log odds of ``probabilities``, finite."""
    kept = np.clip(probabilities, _EDGE, 1.0 - _EDGE)
    return np.asarray(np.log(kept / (1.0 - kept)))
