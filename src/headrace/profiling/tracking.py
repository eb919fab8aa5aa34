"""A profile beside a running engine: it learns from every step and keeps account of how well it predicted."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable

from headrace.core.batch import StepShape
from headrace.core.outputs import RELATIVE_ERRORS, Counts, EngineStats
from headrace.profiling.profile import MeasuredProfile

RECENT = 512
"""Steps of the running median."""

EVERY = 16
"""Steps between two looks at it: whoever asks after every step shall not pay for it in every step."""

WORTH_KEEPING = 64
"""Steps below which a run teaches too little to be written down."""


class Tracker:
    """Conforms to :class:`headrace.core.protocols.StepObserver`.

    Args:
        profile: predicts, and learns after each prediction was compared.
        keep: called once with the profile when the engine ends, if it saw :data:`WORTH_KEEPING` steps; must not raise.
    """

    def __init__(self, profile: MeasuredProfile, keep: Callable[[MeasuredProfile], None] | None = None) -> None:
        self.profile = profile
        self._keep = keep
        self._errors: deque[float] = deque(maxlen=RECENT)
        self._histogram = Counts(RELATIVE_ERRORS)
        self._steps, self._predicted, self._observed = 0, 0.0, 0.0
        self._median: float | None = None
        self._next_median = 0

    def observe(self, shape: StepShape, ms: float) -> None:
        """Compare, count, learn."""
        predicted = self.profile.cost(shape)
        error = abs(predicted / ms - 1.0) if ms > 0 else 0.0
        self._errors.append(error)
        self._histogram.add(error)
        self._steps += 1
        self._predicted += predicted * 1e-3
        self._observed += ms * 1e-3
        self.profile.observe(shape, ms)

    def report(self, stats: EngineStats) -> None:
        """Fill in the fields of ``stats`` about predictions."""
        stats.predicted_steps, stats.predicted_seconds = self._steps, self._predicted
        stats.observed_seconds, stats.profile_error = self._observed, self._histogram
        if self._errors and self._steps >= self._next_median:
            self._median = statistics.median(self._errors)
            self._next_median = self._steps + EVERY
        stats.profile_error_p50 = self._median

    def close(self) -> None:
        """Hand the profile to ``keep``, once."""
        keep, self._keep = self._keep, None
        if keep is not None and self._steps >= WORTH_KEEPING:
            keep(self.profile)
