"""Whether a measurement had the machine to itself: processor time that went to nobody of ours."""

from __future__ import annotations

import time

import psutil


class Neighbours:
    """Counts from its making, or from the last time it was asked."""

    def __init__(self) -> None:
        self._last = _now()

    def cores(self) -> float:
        """How many cores processes that we did not start have kept busy since, on average. Waiting for disks does not count."""
        before, self._last = self._last, _now()
        wall, all_, ours = (now - then for now, then in zip(self._last, before, strict=True))
        return max(0.0, all_ - ours) / wall if wall > 0 else 0.0


def _now() -> tuple[float, float, float]:
    """Seconds of wall, of all processors at work, and of ours: this process and all it started, ended ones included."""
    times = psutil.cpu_times()
    busy = sum(times) - times.idle - getattr(times, "iowait", 0.0)
    busy -= getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # they are in user and nice already
    me = psutil.Process()
    ours = 0.0
    for process in (me, *me.children(recursive=True)):
        try:
            spent = process.cpu_times()
        except psutil.Error:  # it has just ended; its parent has its time
            continue
        ours += spent.user + spent.system + spent.children_user + spent.children_system
    return time.monotonic(), busy, ours
