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
    return [Point(shape_of(step), tuple(ms)) for step, ms in zip(steps, taken, strict=True)]


def timings_within(
    run: Callable[[Step], float], steps: Sequence[Step], seconds: float, *, repeats: int = 5
) -> list[Point]:
    """Time as many of ``steps``, which come in order of importance, as ``seconds`` allow; two at least.

    Each is run once uncounted and once counted; while time is left, further rounds go through those measured, up to ``repeats``.
    """
    deadline = time.monotonic() + seconds
    taken: dict[int, list[float]] = {}
    for index, step in enumerate(steps):
        started = time.monotonic()
        if len(taken) >= 2 and started >= deadline:
            break
        run(step)
        if len(taken) >= 2 and 2 * time.monotonic() - started > deadline:
            break  # a second run would end too late
        taken[index] = [run(step)]
    for _ in range(repeats - 1):
        for index, ms in taken.items():
            if time.monotonic() >= deadline:
                break
            ms.append(run(steps[index]))
    return [Point(shape_of(steps[index]), tuple(ms)) for index, ms in taken.items()]


def shape_of(step: StepShape | EvenStep) -> StepShape:
    """The shape of a step."""
    return step.shape if isinstance(step, EvenStep) else step


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
