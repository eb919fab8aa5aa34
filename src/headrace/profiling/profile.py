"""Measured points, the cost fitted to them, and its correction while steps run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from headrace.core.batch import StepShape
from headrace.profiling.fit import StepCost, fit
from headrace.profiling.regression import Doubles

BUCKETS = 24
_OCTAVES = np.arange(BUCKETS + 1)


@dataclass(frozen=True, slots=True)
class Point:
    """A measured step. ``ms`` are all its timings in milliseconds, in the order taken."""

    shape: StepShape
    ms: tuple[float, ...]

    @property
    def p50(self) -> float:
        """The median, milliseconds; the lower one of an even number, since disturbances only ever add time."""
        return statistics.median_low(self.ms)


class Correction:
    """How much slower (above 1) or faster steps are now than when they were measured, by octave of rows and kind of step.

    Steps with prompts and steps without are corrected apart. Each observation moves its bucket's factor by ``rate`` of the
    relative error, but never by more than ``rate * reach``: a lasting change of speed is learnt in some tens of steps, a single
    hiccup hardly counts. Buckets without observations follow the nearest of their kind, else the other kind, and factors are
    interpolated between octaves, so that the cost stays continuous. Factors stay within 1/``most`` to ``most``.

    Args:
        rate: share of the error to correct at each observation, in (0, 1].
        reach: largest relative error believed at once, in natural logarithms.
        most: largest factor.
    """

    def __init__(self, rate: float = 0.1, reach: float = 0.25, most: float = 16.0) -> None:
        self._rate, self._reach, self._most = rate, reach, math.log(most)
        self._logs: dict[str, dict[int, float]] = {"decode": {}, "prefill": {}}
        self._tables: dict[str, list[float]] = {}

    def factor(self, shape: StepShape) -> float:
        """The factor for a step of ``shape``; 1.0 before any observation."""
        if not self._tables:
            return 1.0
        table = self._tables["prefill" if shape.prefill_tokens else "decode"]
        place = min(math.log2(max(shape.prefill_tokens + shape.decode_tokens, 1)), BUCKETS - 1e-9)
        low = int(place)
        share = place - low
        return math.exp(table[low] * (1 - share) + table[low + 1] * share)

    def growing(self, prefill_tokens: int, decodes: Doubles) -> Doubles | float:
        """float64[k]: the factors for steps of so many prompt tokens and each of these numbers of decoding rows."""
        if not self._tables:
            return 1.0
        table = self._tables["prefill" if prefill_tokens else "decode"]
        return np.exp(np.interp(np.log2(np.maximum(prefill_tokens + decodes, 1.0)), _OCTAVES, table))

    def observe(self, shape: StepShape, predicted: float, actual: float) -> None:
        """Learn that a step of ``shape`` took ``actual`` where ``predicted`` (with the factor) was expected."""
        if not (predicted > 0 and actual > 0 and math.isfinite(actual)):
            return
        kind, octave = _bucket(shape)
        surprise = max(-self._reach, min(self._reach, math.log(actual / predicted)))
        known = self._logs[kind]
        before = known[octave] if octave in known else self._tables[kind][octave] if self._tables else 0.0
        known[octave] = max(-self._most, min(self._most, before + self._rate * surprise))
        self._fill(kind)

    @property
    def factors(self) -> dict[str, float]:
        """Bucket ("decode:3" are decodes of about 8 rows) -> factor, for those observed."""
        return {f"{kind}:{o}": math.exp(v) for kind, known in self._logs.items() for o, v in sorted(known.items())}

    def restore(self, factors: Mapping[str, float]) -> None:
        """Take over what :attr:`factors` said once.

        Raises:
            ValueError: a bucket that does not exist, or a factor that is no positive number.
        """
        for name, factor in factors.items():
            kind, _, octave = name.partition(":")
            if kind not in self._logs or not octave.isdecimal() or int(octave) > BUCKETS:
                raise ValueError(f"no bucket {name!r}")
            if not (factor > 0 and math.isfinite(factor)):
                raise ValueError(f"the factor of {name} is {factor!r}")
            self._logs[kind][int(octave)] = max(-self._most, min(self._most, math.log(factor)))
            self._fill(kind)

    def _fill(self, kind: str) -> None:
        """The table over all octaves from the buckets observed of ``kind``; it serves the other kind too while that has none."""
        known = self._logs[kind]
        octaves = sorted(known)
        table: list[float] = np.interp(_OCTAVES, octaves, [known[o] for o in octaves]).tolist()
        for name, own in self._logs.items():
            if name == kind or not own:
                self._tables[name] = table


def _bucket(shape: StepShape) -> tuple[str, int]:
    rows = max(shape.prefill_tokens + shape.decode_tokens, 1)
    return "prefill" if shape.prefill_tokens else "decode", min(round(math.log2(rows)), BUCKETS)


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
        return self.base.cost(shape) * self.correction.factor(shape)

    def growing(self, shape: StepShape, decodes: Doubles, attended: Doubles) -> Doubles:
        """float64[k]: what :meth:`cost` says of ``shape`` with other numbers of decoding rows and attended pairs, float64[k] each."""
        return self.base.growing(shape, decodes, attended) * self.correction.growing(shape.prefill_tokens, decodes)

    def observe(self, shape: StepShape, ms: float) -> None:
        """Tell the profile how long a step took."""
        self.correction.observe(shape, self.cost(shape), ms)

    def errors(self, points: Iterable[Point]) -> list[float]:
        """Relative error of the prediction at each point, in order."""
        return [abs(self.cost(p.shape) - p.p50) / p.p50 for p in points]
