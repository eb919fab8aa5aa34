"""What a server adds to the engine's steps: time that grows with the running sequences, and stalls of the machine.

A server's own process and its clients work on the cores that the engine computes on, for every token of every sequence, so that a
step takes longer the more of them run. And machines stall: for tens of milliseconds a core is somebody else's.
"""

from __future__ import annotations

import bisect
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from headrace.core.batch import StepShape
from headrace.core.clock import VirtualClock
from headrace.core.protocols import Profile

LEAST_SHARE = 0.2
"""A step never costs less than this share of the profile, whatever was fitted."""

STALL_MS = 3.0
"""Time lost between two tokens from which on it counts as a stall."""

MADE_UP = 4
"""Gaps after a long one that may make up for it: then the reader was late, not the engine."""


@dataclass(frozen=True, slots=True)
class Line:
    """Straight lines between known points, level before the first and after the last.

    Attributes:
        at: ascending places.
        values: one for each.
    """

    at: tuple[float, ...] = (1.0,)
    values: tuple[float, ...] = (0.0,)

    def __call__(self, x: float) -> float:
        """The value at ``x``."""
        right = bisect.bisect_right(self.at, x)
        if right in (0, len(self.at)):
            return self.values[0 if right == 0 else -1]
        low, high = self.at[right - 1], self.at[right]
        before, after = self.values[right - 1], self.values[right]
        return before + (after - before) * (x - low) / (high - low)


@dataclass(frozen=True, slots=True)
class Hosted:
    """A profile with what a server adds, in milliseconds by running sequences.

    Attributes:
        base: what the engine's own steps cost.
        step: added to every step.
        prompt: added besides to steps that take in prompts (a request's first way through the processes).
        token_ms: added besides for every prompt token, however many sequences run.
    """

    base: Profile
    step: Line = field(default_factory=Line)
    prompt: Line = field(default_factory=Line)
    token_ms: float = 0.0

    def cost(self, shape: StepShape) -> float:
        """Milliseconds of a step of ``shape``."""
        alone = self.base.cost(shape)
        added = self.step(shape.sequences)
        if shape.prefill_tokens:
            added += self.prompt(shape.sequences) + self.token_ms * shape.prefill_tokens
        return max(LEAST_SHARE * alone, alone + added)


@dataclass(frozen=True, slots=True)
class Stalls:
    """Stalls as they were seen: ``per_s`` of working time, and the milliseconds of each."""

    per_s: float = 0.0
    ms: tuple[float, ...] = ()


def stalls_of(gaps_ms: Sequence[Sequence[float]]) -> Stalls:
    """Stalls in the times between tokens of requests that had the server to themselves.

    Args:
        gaps_ms: for each request the milliseconds between its tokens, in order.

    A gap counts with what it and the next :data:`MADE_UP` gaps took together above their usual time, if that is
    above :data:`STALL_MS`: tokens that come in a rush after a gap were made in time and read late.
    """
    every = [gap for gaps in gaps_ms for gap in gaps]
    if not every:
        return Stalls()
    usual = statistics.median(every)
    found = []
    for gaps in gaps_ms:
        place = 0
        while place < len(gaps):
            after = gaps[place : place + 1 + MADE_UP]
            lost = sum(after) - usual * len(after)
            if gaps[place] - usual > STALL_MS and lost > STALL_MS:
                found.append(min(lost, gaps[place] - usual))
            place += 1
    working_s = max(sum(every) - sum(found), usual) / 1e3
    return Stalls(len(found) / working_s, tuple(found))


class StallingClock(VirtualClock):
    """A virtual clock of a machine that stalls now and then while it works, drawn by ``seed`` from what was seen."""

    def __init__(self, start: float, stalls: Stalls, seed: int = 0) -> None:
        super().__init__(start)
        self._stalls, self._random = stalls, random.Random(seed)
        self._left = self._next()

    def _next(self) -> float:
        return self._random.expovariate(self._stalls.per_s) if self._stalls.ms else float("inf")

    def advance(self, seconds: float) -> None:
        """Work for ``seconds``, and stall for as long as fate wants."""
        self._left -= seconds
        while self._left <= 0:
            seconds += self._random.choice(self._stalls.ms) * 1e-3
            self._left += self._next()
        super().advance(seconds)

    def idle(self, seconds: float) -> None:
        """Let ``seconds`` pass without work."""
        super().advance(seconds)
