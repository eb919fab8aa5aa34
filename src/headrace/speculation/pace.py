"""How requests stand against their targets: what they must gain to be in time, and who cannot be in time any more."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from headrace.core.policy import SequenceView
from headrace.core.speculation import Floats


class Pace:
    """Requests that decode, as arrays. Times are milliseconds.

    Attributes:
        elapsed: float64[R], since the first token.
        done: float64[R], tokens after the first.
        left: float64[R], tokens still to come, at most.
        target: float64[R], TPOT to keep, headroom taken off; infinite without one.
    """

    def __init__(self, sequences: Sequence[SequenceView], now: float, *, headroom: float = 1.0) -> None:
        self.elapsed: Floats = np.array(
            [0.0 if s.first_token is None else (now - s.first_token) * 1e3 for s in sequences]
        )
        self.done: Floats = np.array([s.decoded - 1.0 for s in sequences])
        self.left: Floats = np.array([float(s.remaining) for s in sequences])
        wanted = [np.inf if s.slo.tpot_ms is None else s.slo.tpot_ms for s in sequences]
        self.target: Floats = np.array(wanted) * headroom

    def need(self, milliseconds: float) -> Floats:
        """float64[R]: tokens each must gain in a step of so many milliseconds to be in time after it (below 0: it may pause)."""
        return np.asarray((self.elapsed + milliseconds) / self.target - self.done)

    @property
    def deadline(self) -> Floats:
        """float64[R]: milliseconds from now until each must have ended, should it use up all its tokens."""
        return np.asarray(self.target * (self.done + self.left) - self.elapsed)

    def speed(self) -> Floats:
        """float64[R]: tokens a millisecond each must make from now on to end in time; infinite where it is too late."""
        rest = self.deadline
        return np.divide(self.left, rest, out=np.full(len(rest), np.inf), where=rest > 0)
