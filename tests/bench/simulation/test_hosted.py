"""What a server adds to steps, and stalls: how they are read off tokens and how they come back."""

from __future__ import annotations

import pytest

from headrace.bench.simulation.hosted import Hosted, Line, StallingClock, Stalls, stalls_of
from headrace.bench.simulation.machines import LinearMachine
from headrace.core.batch import StepShape

PROFILE = LinearMachine(step_ms=2.0)


def test_a_line_is_straight_between_its_points_and_level_beyond() -> None:
    line = Line((1.0, 3.0, 4.0), (2.0, 4.0, 0.0))
    assert [line(x) for x in (0, 1, 2, 3, 3.5, 4, 9)] == [2.0, 2.0, 3.0, 4.0, 2.0, 0.0, 0.0]


def test_what_is_added_depends_on_the_sequences_and_on_prompts() -> None:
    hosted = Hosted(PROFILE, Line((1.0, 3.0), (1.0, 2.0)), Line((1.0,), (5.0,)), token_ms=0.1)
    assert hosted.cost(StepShape(0, 2, 10, 2, 12)) == pytest.approx(3.5)
    assert hosted.cost(StepShape(30, 1, 10, 2, 900)) == pytest.approx(3.5 + 5.0 + 3.0)


def test_a_step_never_costs_nothing() -> None:
    assert Hosted(PROFILE, Line((1.0,), (-100.0,))).cost(StepShape(0, 1, 0, 1, 1)) == pytest.approx(0.4)


def test_a_gap_that_is_made_up_for_is_no_stall() -> None:
    steady = [2.0] * 40
    stalled = [*steady, 22.0, *steady]
    read_late = [*steady, 6.5, 0.2, 0.2, 1.1, 2.0, *steady]
    found = stalls_of([stalled, read_late])
    assert found.ms == pytest.approx((20.0,))
    assert found.per_s == pytest.approx(1 / 0.332, rel=0.02)
    assert stalls_of([steady]) == Stalls(0.0, ())
    assert stalls_of([]) == Stalls()


def test_a_stalling_clock_loses_as_much_time_as_was_seen_and_only_at_work() -> None:
    clock = StallingClock(0.0, Stalls(5.0, (10.0, 30.0)), seed=3)
    for _ in range(100_000):
        clock.advance(0.002)
    assert clock.now() == pytest.approx(200.0 * (1 + 5.0 * 0.020), rel=0.03)
    before = clock.now()
    clock.idle(100.0)
    assert clock.now() == before + 100.0
    plain = StallingClock(1.0, Stalls())
    plain.advance(50.0)
    assert plain.now() == 51.0
