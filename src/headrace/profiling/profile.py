"""Measured points, the cost fitted to them, and its correction while steps run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from headrace.core.batch import StepShape
from headrace.profiling.fit import StepCost, fit

BUCKETS = 24


@dataclass(frozen=True, slots=True)
class Point:
    """A measured step. ``ms`` are all its timings in milliseconds, in the order taken."""

    shape: StepShape
    ms: tuple[float, ...]

    @property
    def p50(self) -> float:
        """The median, milliseconds."""
        return statistics.median(self.ms)


class Correction:
    """How much slower (above 1) or faster steps are now than when they were measured, by octave of rows.

    Each observation moves its octave's factor by ``rate`` of the relative error, but never by more than ``rate * reach``:
    a lasting change of speed is learnt in some tens of steps, a single hiccup hardly counts. Octaves without
    observations follow the nearest ones, and factors are interpolated between octaves, so that the cost stays continuous.

    Args:
        rate: share of the error to correct at each observation, in (0, 1].
        reach: largest relative error believed at once, in natural logarithms.
    """

    def __init__(self, rate: float = 0.2, reach: float = 0.25) -> None:
        self._rate, self._reach = rate, reach
        self._logs: dict[int, float] = {}

    def factor(self, rows: int) -> float:
        """The factor for steps of ``rows`` rows; 1.0 before any observation."""
        if not self._logs:
            return 1.0
        place = math.log2(max(rows, 1))
        low = max((b for b in self._logs if b <= place), default=None)
        high = min((b for b in self._logs if b >= place), default=None)
        if low is None or high is None:
            known = low if high is None else high
            assert known is not None
            return math.exp(self._logs[known])
        share = 0.0 if low == high else (place - low) / (high - low)
        return math.exp(self._logs[low] * (1 - share) + self._logs[high] * share)

    def observe(self, rows: int, predicted: float, actual: float) -> None:
        """Learn that a step of ``rows`` rows took ``actual`` where ``predicted`` (with the factor) was expected."""
        if not (predicted > 0 and actual > 0 and math.isfinite(actual)):
            return
        octave = min(round(math.log2(max(rows, 1))), BUCKETS)
        surprise = max(-self._reach, min(self._reach, math.log(actual / predicted)))
        if octave not in self._logs:
            self._logs[octave] = math.log(self.factor(1 << octave))
        self._logs[octave] += self._rate * surprise

    @property
    def factors(self) -> dict[int, float]:
        """Octave of rows -> factor, for those observed."""
        return {octave: math.exp(value) for octave, value in sorted(self._logs.items())}


class MeasuredProfile:
    """A cost fitted to measured points and corrected online; conforms to :class:`headrace.core.protocols.Profile`.

    Attributes:
        points: what was measured.
        base: the fitted cost, rising with every size of a shape.
        correction: what steps taught since; the corrected cost need not rise everywhere.
    """

    def __init__(self, points: Sequence[Point]) -> None:
        self.points = tuple(points)
        self.base: StepCost = fit([(p.shape, p.p50) for p in self.points])
        self.correction = Correction()

    def cost(self, shape: StepShape) -> float:
        """Predicted milliseconds of a step of ``shape``, as the machine is now."""
        return self.base.cost(shape) * self.correction.factor(shape.prefill_tokens + shape.decode_tokens)

    def observe(self, shape: StepShape, ms: float) -> None:
        """Tell the profile how long a step took."""
        self.correction.observe(shape.prefill_tokens + shape.decode_tokens, self.cost(shape), ms)

    def errors(self, points: Iterable[Point]) -> list[float]:
        """Relative error of the prediction at each point, in order."""
        return [abs(self.cost(p.shape) - p.p50) / p.p50 for p in points]
