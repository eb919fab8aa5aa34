"""The cost of a step as a sum of rising piecewise-linear functions, one for each size of its shape.

A step's time has parts that grow with different sizes: the matrix products with the rows, the head and the sampler with the
decoding rows, the attention with the context it reads and with the pairs it computes, the bookkeeping with the sequences.
So ``cost = constant + sum over sizes of f(size)``, where every ``f`` is piecewise linear, starts at 0 and never falls. Fitted by
non-negative least squares over ramps between knots, which in one size is isotonic regression at the knots.
Errors are relative, and large ones weigh less at each refit, so that a disturbed measurement does not bend the curve.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from headrace.core.batch import StepShape
from headrace.profiling.regression import Doubles, non_negative

SIZES = ("rows", "decode_tokens", "sequences", "context", "attended")
KNOTS = {"rows": 16, "decode_tokens": 8, "sequences": 4, "context": 5, "attended": 6}
"""Knots at most, by size."""

REFITS = 6
_FLOOR = 0.01


@dataclass(frozen=True, slots=True)
class Curve:
    """A rising piecewise-linear function: 0 up to the first knot, linear between knots, and on beyond the last.

    Attributes:
        knots: ascending sizes.
        values: at the knots, milliseconds, never falling, starting at 0.
    """

    knots: tuple[float, ...]
    values: tuple[float, ...]

    def __call__(self, x: float) -> float:
        """Milliseconds at size ``x``."""
        knots, values = self.knots, self.values
        if x <= knots[0] or len(knots) == 1:
            return 0.0
        at = min(bisect_right(knots, x), len(knots) - 1)
        low, high = knots[at - 1], knots[at]
        return values[at - 1] + (values[at] - values[at - 1]) * (x - low) / (high - low)

    def at(self, x: Doubles) -> Doubles:
        """The same at every size of an array."""
        knots, values = self.knots, self.values
        if len(knots) == 1:
            return np.zeros(len(x))
        found: Doubles = np.interp(x, knots, values)
        if x.max(initial=0.0) > knots[-1]:
            rise = (values[-1] - values[-2]) / (knots[-1] - knots[-2])
            found += rise * np.maximum(x - knots[-1], 0.0)
        return found


@dataclass(frozen=True, slots=True)
class StepCost:
    """A fitted cost: milliseconds of a step of any shape, rising with every size; a :class:`headrace.core.protocols.Profile`."""

    constant: float
    curves: tuple[Curve, ...]

    def cost(self, shape: StepShape) -> float:
        """Predicted milliseconds."""
        return self.constant + sum(c(x) for c, x in zip(self.curves, sizes(shape), strict=True))

    def growing(self, shape: StepShape, decodes: Doubles, attended: Doubles) -> Doubles:
        """float64[k]: milliseconds of ``shape`` with other numbers of decoding rows and attended pairs, float64[k] each."""
        rows, decoding, sequences, context, pairs = self.curves
        fixed = self.constant + sequences(shape.sequences) + context(shape.context)
        return fixed + rows.at(shape.prefill_tokens + decodes) + decoding.at(decodes) + pairs.at(attended)


def sizes(shape: StepShape) -> tuple[int, ...]:
    """The sizes of a shape in the order of :data:`SIZES`."""
    rows = shape.prefill_tokens + shape.decode_tokens
    return rows, shape.decode_tokens, shape.sequences, shape.context, shape.attended


def fit(points: Sequence[tuple[StepShape, float]]) -> StepCost:
    """Fit a cost to measured (shape, milliseconds).

    Raises:
        ValueError: without a point, or with one that is not above 0 milliseconds.
    """
    if not points:
        raise ValueError("fit: give at least one measured point")
    target = np.array([ms for _, ms in points])
    if not (np.isfinite(target).all() and target.min() > 0):
        raise ValueError("fit: every measured time must be finite and above 0 ms")
    table = np.array([sizes(shape) for shape, _ in points], float)
    knots = [choose_knots(table[:, i], KNOTS[name]) for i, name in enumerate(SIZES)]
    blocks = [_ramps(table[:, i], k) for i, k in enumerate(knots)]
    matrix = np.hstack([np.ones((len(points), 1)), *blocks])
    weights = 1.0 / target
    rises = np.zeros(matrix.shape[1])
    for _ in range(REFITS):
        rises = non_negative(matrix * weights[:, None], target * weights)
        error = np.abs(matrix @ rises - target) / target
        weights = 1.0 / (target * np.sqrt(np.maximum(error, _FLOOR)))
    curves, at = [], 1
    for k in knots:
        values = np.concatenate([[0.0], np.cumsum(rises[at : at + len(k) - 1])])
        curves.append(Curve(k, tuple(values.tolist())))
        at += len(k) - 1
    return StepCost(float(rises[0]), tuple(curves))


def choose_knots(values: Iterable[float], most: int) -> tuple[float, ...]:
    """At most ``most`` of the distinct ``values``, the smallest and the largest among them, spread evenly in rank."""
    distinct = sorted({float(v) for v in values})
    if len(distinct) > most:
        ranks = np.unique(np.linspace(0, len(distinct) - 1, most).round().astype(int))
        distinct = [distinct[rank] for rank in ranks]
    return tuple(distinct)


def _ramps(x: Doubles, knots: tuple[float, ...]) -> Doubles:
    """float64[m, knots - 1]: how far each x has climbed between two knots, in 0..1 (beyond 1 after the last)."""
    low, high = np.array(knots[:-1]), np.array(knots[1:])
    share: Doubles = np.maximum((x[:, None] - low) / (high - low), 0.0)
    if len(high):
        share[:, :-1] = np.minimum(share[:, :-1], 1.0)
    return share
