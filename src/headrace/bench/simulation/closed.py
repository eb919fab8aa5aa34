"""The closed loop on the simulated engine: so many requests are open at any time, the next one sent when one has ended."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from headrace.bench.simulation.hosted import StallingClock
from headrace.bench.simulation.replay import row_of
from headrace.core.outputs import RequestTiming
from headrace.core.request import Request
from headrace.engine.simulation.runner import SimulatedEngine


def closed_loop(
    engine: SimulatedEngine,
    clock: StallingClock,
    requests: Iterable[Request],
    *,
    concurrency: int,
    seconds: float,
    front_s: float = 0.0,
) -> list[dict[str, Any]]:
    """Rows of the requests that ended within ``seconds``.

    Args:
        requests: in order; arrivals are set here.
        front_s: from sending until the engine knows of a request; the next one is sent as soon as one has ended.
    """
    coming = iter(requests)
    waiting: list[tuple[float, int, Request]] = []
    sent: dict[str, float] = {}
    open_: dict[str, Request] = {}
    timings: dict[str, RequestTiming] = {}
    rows: list[dict[str, Any]] = []
    start = clock.now()

    def send() -> None:
        request = next(coming, None)
        if request is not None:
            sent[request.id] = clock.now()
            request = replace(request, arrival=clock.now() + front_s)
            heapq.heappush(waiting, (request.arrival, len(sent), request))

    for _ in range(concurrency):
        send()
    while clock.now() < start + seconds and (waiting or engine.busy):
        while waiting and waiting[0][0] <= clock.now():
            request = heapq.heappop(waiting)[2]
            engine.add(request)
            open_[request.id] = request
        if not engine.busy:
            clock.idle(waiting[0][0] - clock.now())
            continue
        engine.quiet_until = min(waiting[0][0] if waiting else math.inf, start + seconds)
        for delta in engine.step():
            if delta.timing is not None:
                timings[delta.request_id] = delta.timing
            if delta.reason is not None:
                request = open_.pop(delta.request_id)
                row = row_of(request, timings.pop(request.id, None), clock.now(), finished=True)
                rows.append({**row, "arrival_s": sent[request.id] - start, "end_s": row["end_s"] - start})
                send()
    return rows
