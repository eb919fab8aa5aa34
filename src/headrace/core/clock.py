"""Clocks: the wall clock and one that moves only when told, for simulation and tests."""

from __future__ import annotations

import time


class WallClock:
    """Seconds on the machine's monotonic clock."""

    def now(self) -> float:
        return time.monotonic()


class VirtualClock:
    """A clock that stands still until :meth:`advance` is called; starts at ``start`` seconds."""

    def __init__(self, start: float = 0.0) -> None:
        self._now = start

    def now(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        """Move forward by ``seconds``; raises ValueError on a negative step."""
        if seconds < 0:
            raise ValueError(f"advance({seconds}): a clock does not run backwards")
        self._now += seconds
