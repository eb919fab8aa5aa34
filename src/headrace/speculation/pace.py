"""How requests stand against their targets: what they must gain to be in time, and who cannot be in time any more."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

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
        began = [now if s.first_token is None else s.first_token for s in sequences]
        self.elapsed: Floats = (now - np.array(began)) * 1e3
        self.done: Floats = np.array([s.decoded - 1.0 for s in sequences])
        self.left: Floats = np.array([float(s.remaining) for s in sequences])
        wanted = [np.inf if s.slo.tpot_ms is None else s.slo.tpot_ms for s in sequences]
        self.target: Floats = np.array(wanted) * headroom

    def need(self, milliseconds: float) -> Floats:
        """float64[R]: tokens each must gain in a step of so many milliseconds to be in time right after it."""
        return np.asarray((self.elapsed + milliseconds) / self.target - self.done)

    def time_left(self, horizon: float = np.inf) -> Floats:
        """float64[R]: milliseconds until each must have its next ``horizon`` tokens (or all that are left, if fewer)."""
        return np.asarray(self.target * (self.done + np.minimum(self.left, horizon)) - self.elapsed)

    def speed(self, horizon: float = np.inf) -> Floats:
        """float64[R]: tokens a millisecond each must make to be in time ``horizon`` tokens from now; infinite where it is too late."""
        rest = self.time_left(horizon)
        late = np.full(len(rest), np.inf)
        return np.asarray(np.divide(np.minimum(self.left, horizon), rest, out=late, where=rest > 0))


def share_met(reach: Floats, need: Floats, counted: NDArray[np.bool_]) -> Floats:
    """How many of the ``counted`` requests (last axis) get what they need; one that gets less counts for the eighth power of its share.

    Almost in time is late all the same, but what is just out of reach today may be within reach in the next step.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        near = np.where(need > 0, np.minimum(1.0, reach / need), 1.0)
    return np.asarray(np.where(counted, near**8, 0.0).sum(axis=-1))
