"""The simulated counterpart of a server: its engine's configuration, and what passes outside the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from headrace.bench.openloop.shots import Shot
from headrace.bench.simulation.closed import closed_loop
from headrace.bench.simulation.hosted import Line, StallingClock, Stalls
from headrace.bench.simulation.replay import START, Replay
from headrace.core.policy import Limits
from headrace.core.protocols import Profile
from headrace.core.request import Request, SamplingParams
from headrace.engine.policies import get_policy
from headrace.engine.simulation.runner import SimulatedEngine


@dataclass(frozen=True, slots=True)
class Machine:
    """A server that is simulated.

    Attributes:
        profile: what steps cost.
        policy: a registered name.
        limits, slots, context, prefix_cache: as the real engine has them.
        front: milliseconds between client and engine by running sequences, part of every TTFT.
        stalls: of the machine while it works.
        seed: of when they come.
    """

    profile: Profile
    policy: str
    limits: Limits
    slots: int
    context: int
    prefix_cache: bool = True
    front: Line = field(default_factory=Line)
    stalls: Stalls = field(default_factory=Stalls)
    seed: int = 0

    def replay(self, shots: Sequence[Shot], sent_s: Sequence[float], cutoff_s: float) -> list[dict[str, Any]]:
        """Rows of ``shots`` sent at ``sent_s`` seconds, open ones cut at ``cutoff_s``; the order is that of their ends."""
        clock = StallingClock(START, self.stalls, self.seed)
        front = self.front(1) * 1e-3
        coming = [_request(shot, START + at + front) for shot, at in zip(shots, sent_s, strict=True)]
        found = Replay(self._engine(clock), clock, clock.idle, coming, horizon_s=START + cutoff_s).run()
        rows: list[dict[str, Any]] = [
            {**row, "arrival_s": row["arrival_s"] - front - START, "end_s": row["end_s"] - START} for row in found
        ]
        return self._seen_by_client(rows)

    def closed(self, shots: Sequence[Shot], *, concurrency: int, seconds: float) -> list[dict[str, Any]]:
        """Rows of a closed loop over ``shots``; see :func:`headrace.bench.simulation.closed.closed_loop`."""
        clock = StallingClock(START, self.stalls, self.seed)
        front = self.front(concurrency) * 1e-3
        coming = (_request(shot, START) for shot in shots)
        rows = closed_loop(self._engine(clock), clock, coming, concurrency=concurrency, seconds=seconds, front_s=front)
        for row in rows:
            row["ttft_ms"] += front * 1e3
        return rows

    def _engine(self, clock: StallingClock) -> SimulatedEngine:
        return SimulatedEngine(
            self.profile, get_policy(self.policy), clock, limits=self.limits, slots=self.slots, context=self.context,
            prefix_cache=self.prefix_cache,
        )  # fmt: skip

    def _seen_by_client(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows with the way between client and engine in their TTFT, as long as it was with so many open at the time."""
        for row in rows:
            if row["ttft_ms"] is not None:
                at = row["arrival_s"] + row["ttft_ms"] * 1e-3
                beside = sum(other["arrival_s"] <= at <= other["end_s"] for other in rows)
                row["ttft_ms"] += self.front(beside)
        return rows


def _request(shot: Shot, arrival: float) -> Request:
    params = SamplingParams(temperature=0.0, max_tokens=shot.new, ignore_eos=True, seed=int(shot.id))
    a = shot.arrival
    return Request(
        shot.id,
        shot.prompt,
        params,
        priority=a.priority,
        slo=a.slo,
        tier=a.category or None,
        arrival=arrival,
        owner=a.owner,
    )
