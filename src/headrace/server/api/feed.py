"""From an engine's deltas to text: one :class:`Feed` per HTTP request, over all of its prompts and choices.

The feed reads the engine as fast as it speaks and merges what its own reader has not taken yet, so a client that
reads slowly holds one string per choice and never a queue.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from headrace.core.errors import EngineUnavailable, HeadraceError
from headrace.core.outputs import RequestTiming, SequenceDelta, TokenLogprobs
from headrace.core.protocols import Service
from headrace.core.request import Request, SamplingParams
from headrace.engine.text import TextStream
from headrace.server.api.outcome import Outcome
from headrace.server.errors import internal_error

if TYPE_CHECKING:
    from headrace.models.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Piece:
    """New output of one choice. ``first`` marks its first piece, ``finish_reason`` its last."""

    index: int
    text: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    first: bool = False
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class Choice:
    """One sequence of the answer: its text so far unread, its tokens and its times, and what became of drafts."""

    def __init__(self, index: int, stream: TextStream, request: Request) -> None:
        self.index = index
        self.finish_reason: str | None = None
        self.timing = RequestTiming(request.arrival)
        self.steps = self.drafted = self.accepted = 0
        self._stop_ids = frozenset(request.params.stop_token_ids)
        self._stream = stream
        self._unread: Piece | None = None
        self._texts: list[str] = []  # its text, joined when it is taken
        self._taken = False

    @property
    def tokens(self) -> int:
        """Tokens generated that count."""
        return self._stream.tokens

    @property
    def done(self) -> bool:
        """True once a finish reason is known."""
        return self.finish_reason is not None

    def accept(self, delta: SequenceDelta) -> bool:
        """Take in a delta; True when there is something new to read."""
        part = self._stream.push(delta)
        self._note_time(delta)
        self.steps += delta.steps
        self.drafted += delta.drafted
        self.accepted += delta.accepted
        if part.done:
            self.finish_reason = part.finish_reason or "stop"
        if not (part.text or part.logprobs or part.done):
            return False
        piece = self._unread
        if piece is None:
            piece = self._unread = Piece(self.index, first=not self._taken)
            self._taken = True
        self._texts.append(part.text)
        piece.logprobs.extend(part.logprobs or ())
        if part.done:
            piece.finish_reason = self.finish_reason
            if isinstance(part.stop_reason, str) or part.stop_reason in self._stop_ids:
                piece.stop_reason = part.stop_reason  # the model's own end-of-text gives no reason, as in vLLM
        return True

    def _note_time(self, delta: SequenceDelta) -> None:
        """Keep the engine's times; where it stays silent (between the first and the last token), our own."""
        now = time.monotonic()
        if delta.timing is not None:
            self.timing = replace(delta.timing)
        if delta.tokens and (delta.reason is None or self.timing.last_token is None):
            if self.timing.first_token is None:
                self.timing.first_token = now
            self.timing.last_token = now
            self.timing.decoded = self.tokens

    def take(self) -> Piece | None:
        """What is new since the last call."""
        piece, self._unread = self._unread, None
        if piece is not None:
            piece.text = "".join(self._texts)
            self._texts.clear()
        return piece


class Feed:
    """The answer to one HTTP request while it grows.

    Args:
        service: who generates.
        tokenizer: turns tokens into text.
        requests: one per prompt, with equal parameters; choice ``i`` of prompt ``p`` has index ``p * n + i``.
        slo_class: name under which attainment is counted.
        on_open, on_close: told when the feed starts to hold the engine's attention and when it no longer does.
    """

    def __init__(
        self,
        service: Service,
        tokenizer: Tokenizer,
        requests: Sequence[Request],
        *,
        slo_class: str = "none",
        on_open: Callable[[Feed], None],
        on_close: Callable[[Feed], None],
    ) -> None:
        self._service, self.requests, self.slo_class = service, tuple(requests), slo_class
        self._on_open, self._on_close = on_open, on_close
        params: SamplingParams = requests[0].params
        self.choices = [
            Choice(p * params.n + i, TextStream(tokenizer, request.params), request)
            for p, request in enumerate(requests)
            for i in range(params.n)
        ]
        self._n = params.n
        self._tasks: list[asyncio.Task[None]] = []
        self._changed = asyncio.Event()
        self._open = False
        self.error: HeadraceError | None = None
        self.gone = False

    @property
    def done(self) -> bool:
        """True when nothing more will come."""
        return self.error is not None or self.gone or all(choice.done for choice in self.choices)

    async def open(self) -> None:
        """Submit the requests; all of them or none. Raises what the service raises."""
        streams: dict[int, AsyncIterator[SequenceDelta]] = {}
        try:
            for prompt, request in enumerate(self.requests):
                streams[prompt] = self._service.submit(request)
        except BaseException:
            for prompt, stream in streams.items():
                await self._release(self.requests[prompt], stream)
            raise
        self._open = True
        self._on_open(self)
        self._tasks = [asyncio.create_task(self._pump(prompt, stream)) for prompt, stream in streams.items()]

    async def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for news (a piece, an error, the end); False when there was none in ``timeout_s`` seconds."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            return False
        self._changed.clear()
        return True

    async def settle(self, timeout_s: float) -> None:
        """Wait, at most ``timeout_s`` seconds, until the engine has accepted (first piece) or refused (error)."""
        if await self.wait(timeout_s):
            self._changed.set()

    def take(self) -> list[Piece]:
        """What is new, at most one piece per choice, by index."""
        return [piece for choice in self.choices if (piece := choice.take()) is not None]

    def fail(self, error: HeadraceError) -> None:
        """End the answer with ``error``; the first error stays."""
        self.error = self.error or error
        self._changed.set()

    def abandon(self) -> None:
        """The client has left."""
        self.gone = True
        self._changed.set()

    async def close(self) -> None:
        """Stop everything that still runs for this request; harmless when called again."""
        if not self._open:
            return
        self._open = False
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._on_close(self)

    def outcome(self) -> Outcome:
        """Sums for ``usage`` and the metrics, as of now."""
        lost = "error" if self.error is not None else "cancelled"
        first = [self.choices[p * self._n] for p in range(len(self.requests))]
        return Outcome(
            prompt_tokens=sum(len(request.prompt) for request in self.requests),
            completion_tokens=sum(choice.tokens for choice in self.choices),
            cached_tokens=sum(choice.timing.cached_tokens for choice in first),
            slo=self.requests[0].slo,
            slo_class=self.slo_class,
            timings=[choice.timing for choice in self.choices if choice.timing.first_token is not None],
            finish_reasons=[choice.finish_reason or lost for choice in self.choices],
            steps=sum(choice.steps for choice in self.choices),
            drafted=sum(choice.drafted for choice in self.choices),
            accepted=sum(choice.accepted for choice in self.choices),
        )

    async def _pump(self, prompt: int, stream: AsyncIterator[SequenceDelta]) -> None:
        request = self.requests[prompt]
        choices = self.choices[prompt * self._n : (prompt + 1) * self._n]
        try:
            async for delta in stream:
                self._accept(request, choices[delta.index], delta)
                if self.error is not None or all(choice.done for choice in choices):
                    return
            raise EngineUnavailable("the engine ended the request early: send it again")
        except HeadraceError as error:
            self.fail(error)
        except Exception:
            log.exception("request %s failed", request.id)
            self.fail(internal_error())
        finally:
            await self._release(request, stream)

    def _accept(self, request: Request, choice: Choice, delta: SequenceDelta) -> None:
        if choice.done:
            return
        if delta.reason in ("error", "abort"):
            raise delta.error or EngineUnavailable("the engine stopped the request before its end: send it again")
        news = choice.accept(delta)
        if choice.done and delta.reason is None:  # a stop string: the engine does not know yet
            self._service.cancel(request.id, delta.index)
        if news:
            self._changed.set()

    async def _release(self, request: Request, stream: AsyncIterator[SequenceDelta]) -> None:
        """Let go of a stream; what the engine has not finished, it stops."""
        close = getattr(stream, "aclose", None)
        if close is None:
            self._service.cancel(request.id)
        else:
            await close()
