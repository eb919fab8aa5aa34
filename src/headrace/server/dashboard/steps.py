"""What the engine did of late: its counters, sampled once a second into a ring. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from headrace.core.outputs import EngineStats

COLUMNS = (
    "at", "steps", "busy_s", "prefill", "decode", "accepted", "rejected", "slots_used", "slots_cached", "slots", "running", "waiting",
)  # fmt: skip
KEPT = 300

Row = tuple[float, ...]


class StepRing:
    """Differences between snapshots.

    A row has the time of the second snapshot; the steps since the first, their seconds, and their tokens by purpose: rows of
    prompts, newest tokens, and draft nodes that were accepted or rejected; then slots and sequences as they are.

    Args:
        number: gives the next revision.
        kept: rows remembered.
    """

    def __init__(self, number: Callable[[], int], kept: int = KEPT) -> None:
        self._number = number
        self._rows: deque[tuple[int, Row]] = deque(maxlen=kept)
        self._before: Row | None = None
        self.step_limit = 0

    def add(self, at: float, stats: EngineStats) -> None:
        """Take in a snapshot; ``at`` in seconds. One of an engine that has restarted begins anew."""
        self.step_limit = stats.step_limit
        counted = (
            float(stats.steps),
            stats.step_seconds.total,
            float(stats.prefill_tokens),
            float(stats.decode_tokens - stats.drafted),
            float(stats.accepted),
            float(stats.drafted - stats.accepted),
        )
        before = self._before
        self._before = counted
        if before is None or counted[0] < before[0]:
            return
        used = stats.slots_total - stats.slots_free - stats.slots_cached
        grown = (round(now - then, 4) for now, then in zip(counted, before, strict=True))
        levels = (used, stats.slots_cached, stats.slots_total, stats.running, stats.waiting)
        self._rows.append((self._number(), (round(at, 3), *grown, *levels)))

    def rows(self, after: int) -> list[Row]:
        """Rows with a revision above ``after``, the oldest first."""
        return [row for revision, row in self._rows if revision > after]
