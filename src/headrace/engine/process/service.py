"""The engine as an asynchronous service: its own process, one pipe, and a restart when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

from headrace.core.errors import EngineUnavailable, HeadraceError, InvalidRequest, Overloaded
from headrace.core.outputs import EngineStats, SequenceDelta
from headrace.core.policy import Limits
from headrace.core.protocols import ModelCard, ServiceState
from headrace.core.request import Request
from headrace.engine.process.admission import complete_request
from headrace.engine.process.link import Link

log = logging.getLogger(__name__)

CRASHES_ALLOWED = 5
CRASH_WINDOW_S = 60.0


class DeltaStream:
    """The deltas of one request. Those not read yet are merged, so a slow reader holds tokens, never a growing queue."""

    def __init__(self, request_id: str, sequences: int, cancel: Callable[[], None]) -> None:
        self.request_id = request_id
        self._open = set(range(sequences))
        self._unread: dict[int, SequenceDelta] = {}
        self._arrived = asyncio.Event()
        self._cancel = cancel

    def feed(self, delta: SequenceDelta) -> bool:
        """Take in a delta; True when it ended the last open sequence."""
        delta.request_id = self.request_id
        held = self._unread.get(delta.index)
        self._unread[delta.index] = delta if held is None else _merge(held, delta)
        if delta.reason is not None:
            self._open.discard(delta.index)
        self._arrived.set()
        return not self._open

    def fail(self, error: HeadraceError) -> None:
        """End every open sequence with ``error``."""
        for index in tuple(self._open):
            self.feed(SequenceDelta(self.request_id, index, reason="error", error=error))

    def __aiter__(self) -> AsyncIterator[SequenceDelta]:
        return self

    async def __anext__(self) -> SequenceDelta:
        while not self._unread:
            if not self._open:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        return self._unread.pop(next(iter(self._unread)))

    async def aclose(self) -> None:
        """Stop reading; cancels the request when it is still open."""
        if self._open:
            self._open.clear()
            self._arrived.set()
            self._cancel()


def _merge(first: SequenceDelta, second: SequenceDelta) -> SequenceDelta:
    """One delta that says what ``first`` and then ``second`` said."""
    logprobs = None if second.logprobs is None else [*(first.logprobs or ()), *second.logprobs]
    return replace(
        second,
        tokens=first.tokens + second.tokens,
        logprobs=logprobs if logprobs is not None else first.logprobs,
        timing=second.timing or first.timing,
        steps=first.steps + second.steps,
        drafted=first.drafted + second.drafted,
        accepted=first.accepted + second.accepted,
    )


class ProcessService:
    """A :class:`headrace.core.protocols.Service` over an engine in a child process.

    Args:
        target: module-level function run in the child as ``target(connection, *arguments)``; it serves the messages of
            :mod:`headrace.engine.process.worker`.
        arguments: picklable arguments for it.
        max_queue: open requests beyond the running ones above which new ones are refused.
    """

    def __init__(self, target: Callable[..., None], arguments: tuple[Any, ...] = (), *, max_queue: int = 256) -> None:
        self._target, self._arguments, self._max_queue = target, arguments, max_queue
        self._state: ServiceState = "loading"
        self._card: ModelCard | None = None
        self._limits = Limits()
        self.failure: HeadraceError | None = None
        # The engine knows a request by a name of ours that is never used twice: an id may come back to us while the engine still
        # has something to say of the request that bore it before.
        self._names: dict[str, str] = {}
        self._numbers = itertools.count()
        self._streams: dict[str, DeltaStream] = {}  # by our name, as are the weights
        self._weights: dict[str, int] = {}
        self._link: Link | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._changed = asyncio.Event()
        self._stats = EngineStats()
        self._stats_waiters: list[asyncio.Future[EngineStats]] = []
        self._crashes: list[float] = []
        self._finish_rate = _Rate()

    # ---- life cycle ------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the engine's process; returns at once, while it loads."""
        self._loop = asyncio.get_running_loop()
        self._spawn()

    def _spawn(self) -> None:
        assert self._loop is not None
        loop = self._loop
        link_box: list[Link] = []

        def receive(message: tuple[Any, ...]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: we are shutting down
                loop.call_soon_threadsafe(lambda: self._on_message(link_box[0], message))

        self._link = Link(self._target, self._arguments, receive)
        link_box.append(self._link)
        self._link.start()

    async def ready(self, timeout_s: float | None = None) -> None:
        """Wait until requests are served; raises the error that stopped the engine from loading, also when it is told to end."""

        async def wait() -> None:
            while self._state == "loading":
                self._changed.clear()
                await self._changed.wait()

        await asyncio.wait_for(wait(), timeout_s)
        if self._state == "failed":
            raise self.failure or EngineUnavailable("the engine failed to start")
        if self._state == "draining":
            raise EngineUnavailable("the server is shutting down", code="shutting_down")

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests and wait for the open ones, at most ``timeout_s`` seconds."""
        if self._state in ("ready", "loading"):
            self._set_state("draining")
        deadline = time.monotonic() + timeout_s
        while self._streams and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        """End the engine's process; open requests get an error."""
        self._set_state("draining" if self._state != "failed" else "failed")
        self._fail_open(EngineUnavailable("the server is shutting down", code="shutting_down"))
        link, self._link = self._link, None
        if link is not None:
            await asyncio.to_thread(link.stop)

    # ---- the service -----------------------------------------------------------------------------------------

    @property
    def card(self) -> ModelCard:
        """The served model; raises :class:`EngineUnavailable` before the first load has ended."""
        if self._card is None:
            raise EngineUnavailable("the model is still loading: try again in a moment")
        return self._card

    @property
    def state(self) -> ServiceState:
        """Where the service stands."""
        return self._state

    @property
    def pid(self) -> int | None:
        """Process id of the engine, for operators and tests."""
        return self._link.process.pid if self._link else None

    def submit(self, request: Request) -> DeltaStream:
        """Queue a request; see :class:`headrace.core.protocols.Service`. Raises at once when it cannot be taken."""
        if self._state != "ready" or self._link is None:
            raise EngineUnavailable(f"the engine is {self._state}: try again in a moment")
        request = complete_request(request, self.card, self._limits, now=time.monotonic())
        waiting = sum(self._weights.values()) - self._limits.max_sequences
        if waiting >= self._max_queue:
            raise Overloaded(
                f"{waiting} requests are waiting, as many as the queue holds: try again later",
                retry_after_s=self._finish_rate.seconds_for(waiting),
            )
        if request.id in self._names:
            raise InvalidRequest(f"request id {request.id!r} is already open: choose another", field="id")
        name = f"{request.id}#{next(self._numbers)}"
        stream = DeltaStream(request.id, request.params.n, lambda: self._abandon(name))
        self._names[request.id], self._streams[name], self._weights[name] = name, stream, request.params.n
        self._link.send(("add", replace(request, id=name)))
        return stream

    def cancel(self, request_id: str, index: int | None = None) -> None:
        """Stop a request, or one of its sequences, at the next step."""
        if request_id in self._names and self._link is not None:
            self._link.send(("cancel", self._names[request_id], index))

    async def stats(self) -> EngineStats:
        """A snapshot; the last one known when the engine is busy for over a second or not there."""
        if self._state not in ("ready", "draining") or self._link is None:
            return self._stats
        waiter: asyncio.Future[EngineStats] = asyncio.get_running_loop().create_future()
        self._stats_waiters.append(waiter)
        self._link.send(("stats",))
        try:
            return await asyncio.wait_for(waiter, 1.0)
        except TimeoutError:
            return self._stats
        finally:
            with contextlib.suppress(ValueError):  # answered: it is gone
                self._stats_waiters.remove(waiter)

    # ---- what the engine says --------------------------------------------------------------------------------

    def _abandon(self, name: str) -> None:
        if self._link is not None:
            self._link.send(("cancel", name, None))
        self._forget(name)

    def _forget(self, name: str) -> None:
        del self._names[self._streams.pop(name).request_id], self._weights[name]

    def _set_state(self, state: ServiceState) -> None:
        self._state = state
        self._changed.set()

    def _on_message(self, link: Link, message: tuple[Any, ...]) -> None:
        if link is not self._link:
            return  # an engine that was replaced
        match message:
            case ("deltas", deltas):
                for delta in deltas:
                    name = delta.request_id
                    stream = self._streams.get(name)
                    if stream is not None and stream.feed(delta):
                        self._finish_rate.count()
                        self._forget(name)
            case ("stats", stats):
                self._stats = self._in_their_words(stats)
                self._answer_stats()
            case ("unsent", ("add", request), error):
                if request.id in self._streams:
                    log.error("a request cannot be sent to the engine: %s", error)
                    self._streams[request.id].fail(InvalidRequest(f"the request cannot be sent to the engine: {error}"))
                    self._forget(request.id)
            case ("ready", card, limits):
                link.loaded = True
                self._card, self._limits = card, limits
                if self._state == "loading":
                    self._set_state("ready")
            case ("failed", error):
                self.failure = error
                self._set_state("failed")
            case ("exit", code):
                self._on_exit(code)

    def _in_their_words(self, stats: EngineStats) -> EngineStats:
        """The snapshot with the ids that clients of this service know."""
        stats.prefilling = {
            self._streams[name].request_id: since for name, since in stats.prefilling.items() if name in self._streams
        }
        return stats

    def _answer_stats(self) -> None:
        waiters, self._stats_waiters = self._stats_waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(self._stats)

    def _on_exit(self, code: int | None) -> None:
        served = self._state != "loading"
        self._link = None
        self._answer_stats()
        self._fail_open(
            EngineUnavailable(
                "the engine stopped unexpectedly and restarts: send the request again", code="engine_crashed"
            )
        )
        if self._state in ("failed", "draining"):
            return
        now = time.monotonic()
        # One that dies while it loads is given up however long each attempt takes.
        self._crashes = [t for t in self._crashes if not served or now - t < CRASH_WINDOW_S] + [now]
        if len(self._crashes) > CRASHES_ALLOWED:
            self.failure = EngineUnavailable(
                f"the engine died {len(self._crashes)} times in a short while: see the log"
            )
            self._set_state("failed")
            return
        delay = 0.0 if len(self._crashes) == 1 else 2.0 ** (len(self._crashes) - 2)
        log.error("engine process ended with exit code %s; restarting in %.0f s", code, delay)
        self._set_state("loading")
        assert self._loop is not None
        self._loop.call_later(delay, self._respawn)

    def _respawn(self) -> None:
        if self._state == "loading" and self._link is None:
            try:
                self._spawn()
            except OSError as error:  # no memory or no process left: perhaps later
                log.error("the engine's process cannot be started: %s", error)
                self._on_exit(None)

    def _fail_open(self, error: HeadraceError) -> None:
        for name, stream in list(self._streams.items()):
            stream.fail(error)
            self._forget(name)


class _Rate:
    """How fast requests finish, to tell a refused client when to come back."""

    def __init__(self) -> None:
        self._times: list[float] = []

    def count(self) -> None:
        """Note that a request has finished."""
        self._times = [*self._times[-63:], time.monotonic()]

    def seconds_for(self, waiting: int) -> float:
        """Seconds until about a tenth of ``waiting`` requests have left, from 1 to 60."""
        if len(self._times) < 2 or self._times[-1] == self._times[0]:
            return 1.0
        rate = (len(self._times) - 1) / (self._times[-1] - self._times[0])
        return min(60.0, max(1.0, waiting / 10 / rate))
