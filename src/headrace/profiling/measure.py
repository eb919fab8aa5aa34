"""Timing the steps of a grid."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from headrace.core.batch import StepShape
from headrace.core.errors import InvalidRequest
from headrace.profiling.profile import MeasuredProfile, Point
from headrace.profiling.shapes import EvenStep

Step = TypeVar("Step", StepShape, EvenStep)


def timings(
    run: Callable[[Step], float],
    steps: Sequence[Step],
    *,
    repeats: int = 5,
    max_seconds: float | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[Point]:
    """Time every step ``repeats`` times.

    Rounds go through all steps in a new order each, so that a slow spell of the machine falls on all alike; a first round that is
    not counted warms caches and buffers up.

    Args:
        run: executes a step and returns its milliseconds.
        steps: shapes, or steps that have one.
        max_seconds: start no further round after this long; at least one is counted.
        report: called as ``report(done, total)`` after each step.

    Raises:
        InvalidRequest: nothing to measure.
    """
    if not steps or repeats < 1:
        raise InvalidRequest("nothing to measure: give at least one step and one repeat", field="repeats")
    started = time.monotonic()
    order = list(range(len(steps)))
    shuffle = random.Random(0).shuffle
    taken: list[list[float]] = [[] for _ in steps]
    total = (repeats + 1) * len(steps)
    for turn in range(repeats + 1):
        if turn > 1 and max_seconds is not None and time.monotonic() - started > max_seconds:
            break
        shuffle(order)
        for place, index in enumerate(order):
            ms = run(steps[index])
            if turn:
                taken[index].append(ms)
            report(turn * len(steps) + place + 1, total)
    return [
        Point(step.shape if isinstance(step, EvenStep) else step, tuple(ms))
        for step, ms in zip(steps, taken, strict=True)
    ]


def measure(
    run: Callable[[Step], float],
    steps: Sequence[Step],
    *,
    repeats: int = 5,
    max_seconds: float | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> MeasuredProfile:
    """Time the steps as :func:`timings` does and fit a profile to their medians."""
    return MeasuredProfile(timings(run, steps, repeats=repeats, max_seconds=max_seconds, report=report))
