"""Open-loop replay: requests come when the workload says, however far behind the engine is; on a virtual clock or the wall's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

from headrace.bench.metrics import RequestRow
from headrace.core.errors import HeadraceError
from headrace.core.outputs import RequestTiming
from headrace.core.protocols import Clock
from headrace.core.request import Request
from headrace.engine.engine import Engine
from headrace.engine.simulation.runner import SimulatedEngine

START = 1.0
"""Where the virtual clock of a replay begins: an arrival at 0.0 would mean "not stamped" to the engine."""


class Replay:
    """Feeds requests to an engine and keeps one row for each.

    Args:
        engine: runs on ``clock``.
        clock: what arrivals are compared with.
        wait: lets the given seconds pass while nothing is there to do: ``clock.advance`` of a virtual clock, else ``time.sleep``.
        requests: in order of arrival; read as they come due.
        horizon_s: clock time at which to stop; what is open then counts as not finished.
    """

    def __init__(
        self,
        engine: Engine,
        clock: Clock,
        wait: Callable[[float], None],
        requests: Iterable[Request],
        *,
        horizon_s: float | None = None,
    ) -> None:
        self._engine, self._clock, self._wait_for, self._horizon = engine, clock, wait, horizon_s
        self._coming: Iterator[Request] = iter(requests)
        self._next = next(self._coming, None)
        self._open: dict[str, Request] = {}
        self._timings: dict[str, RequestTiming] = {}
        self._rows: list[RequestRow] = []
        self._idle_steps = 0

    def run(self) -> list[RequestRow]:
        """Replay to the end (or the horizon) and return the rows in order of ending, unfinished ones last.

        Raises:
            RuntimeError: the engine has requests but neither runs nor ends any, and nothing is to come.
        """
        while self._next is not None or self._engine.busy:
            if self._horizon is not None and self._clock.now() >= self._horizon:
                break
            self._submit_due()
            if isinstance(self._engine, SimulatedEngine):
                self._engine.quiet_until = self._quiet_until()
            steps = self._engine.stats().steps
            deltas = self._engine.step() if self._engine.busy else []
            for delta in deltas:
                if delta.timing is not None:
                    self._timings[delta.request_id] = delta.timing
                if delta.reason is not None:
                    self._end(self._open.pop(delta.request_id), finished=delta.reason in ("stop", "length"))
            if deltas or self._engine.stats().steps > steps:
                self._idle_steps = 0
            else:
                self._wait()
        if self._open and isinstance(self._engine, SimulatedEngine):
            self._engine.settle()
        for request in list(self._open.values()):
            self._end(request, finished=False)
        self._open.clear()
        return self._rows

    def _submit_due(self) -> None:
        while self._next is not None and self._next.arrival <= self._clock.now():
            request = self._next
            self._next = next(self._coming, None)
            try:
                self._engine.add(request)
                self._open[request.id] = request
            except HeadraceError:
                self._end(request, finished=False)

    def _quiet_until(self) -> float:
        arrival = math.inf if self._next is None else self._next.arrival
        return arrival if self._horizon is None else min(arrival, self._horizon)

    def _wait(self) -> None:
        """Nothing ran: let time pass until the next arrival. A busy engine first gets as many tries as it has requests to preempt."""
        self._idle_steps += 1
        if self._engine.busy and self._idle_steps <= len(self._open) + 1:
            return
        if self._next is None:
            if self._engine.busy:
                raise RuntimeError("the policy runs nothing although requests are open: no later step can change that")
            return
        self._wait_for(max(0.0, self._next.arrival - self._clock.now()))

    def _end(self, request: Request, *, finished: bool) -> None:
        self._rows.append(row_of(request, self._timings.pop(request.id, None), self._clock.now(), finished=finished))


def row_of(request: Request, timing: RequestTiming | None, now: float, *, finished: bool) -> RequestRow:
    """The row of a request whose stay ended at ``now``."""
    end = timing.last_token if timing is not None and timing.last_token is not None else now
    return RequestRow(
        id=request.id,
        category=request.tier or "",
        owner=request.owner,
        arrival_s=request.arrival,
        end_s=end,
        prompt_tokens=len(request.prompt),
        output_tokens=request.params.max_tokens or 0,
        decoded=timing.decoded if timing else 0,
        cached_tokens=timing.cached_tokens if timing else 0,
        preemptions=timing.preemptions if timing else 0,
        finished=finished,
        ttft_ms=timing.ttft_ms if timing else None,
        tpot_ms=timing.tpot_ms if timing else None,
        e2e_ms=(end - request.arrival) * 1e3 if finished else None,
        slo_ttft_ms=request.slo.ttft_ms,
        slo_tpot_ms=request.slo.tpot_ms,
    )
