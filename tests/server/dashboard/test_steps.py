"""Differences between snapshots."""

from __future__ import annotations

import itertools

from headrace.core.outputs import EngineStats
from headrace.server.dashboard.steps import COLUMNS, StepRing


def ring(kept: int = 300) -> StepRing:
    numbers = itertools.count(1)
    return StepRing(lambda: next(numbers), kept)


def stats(steps: int, **more: int) -> EngineStats:
    made = EngineStats(steps=steps, slots_total=100, slots_free=70, slots_cached=10, step_limit=512, **more)
    made.step_seconds.total = 0.01 * steps
    return made


def rows(made: StepRing, after: int = 0) -> list[dict[str, float]]:
    return [dict(zip(COLUMNS, row, strict=True)) for row in made.rows(after)]


def test_tokens_by_purpose_add_up() -> None:
    made = ring()
    made.add(1.0, stats(10, prefill_tokens=50, decode_tokens=20, drafted=8, accepted=5))
    made.add(2.0, stats(14, prefill_tokens=57, decode_tokens=40, drafted=20, accepted=9, running=3, waiting=2))
    (row,) = rows(made)
    assert row == {
        "at": 2.0, "steps": 4, "busy_s": 0.04, "prefill": 7, "decode": 8, "accepted": 4, "rejected": 8,
        "slots_used": 20, "slots_cached": 10, "slots": 100, "running": 3, "waiting": 2,
    }  # fmt: skip
    assert row["prefill"] + row["decode"] + row["accepted"] + row["rejected"] == (57 - 50) + (40 - 20)
    assert made.step_limit == 512


def test_an_engine_that_restarted_begins_anew() -> None:
    made = ring()
    for at, steps in ((1.0, 10), (2.0, 20), (3.0, 4), (4.0, 6)):
        made.add(at, stats(steps))
    assert [(row["at"], row["steps"]) for row in rows(made)] == [(2.0, 10), (4.0, 2)]


def test_bounded_and_only_what_is_new() -> None:
    made = ring(kept=5)
    for at in range(20):
        made.add(float(at), stats(at))
    assert [row["at"] for row in rows(made)] == [15, 16, 17, 18, 19]
    assert [row["at"] for row in rows(made, after=18)] == [19]
    assert rows(made, after=19) == []
