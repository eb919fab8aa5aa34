"""What all routes share: the service, its tokenizer and card, the settings, the metrics and the open requests."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Annotated, TypeVar

from fastapi import Depends, Request

from headrace.core.errors import EngineUnavailable, HeadraceError, ModelNotFound
from headrace.core.outputs import EngineStats
from headrace.core.protocols import ModelCard, Service, ServiceState
from headrace.server.dashboard.monitor import Monitor
from headrace.server.settings import ServerSettings
from headrace.version import __version__

if TYPE_CHECKING:
    from headrace.models.text.tokenizer import Tokenizer
    from headrace.server.api.feed import Feed
    from headrace.server.metrics.exposition import Metrics

log = logging.getLogger(__name__)

T = TypeVar("T")


class Serving:
    """The state behind the routes.

    Args:
        service: the engine, or many.
        tokenizer: called once, off the event loop, after the service has become ready.
        settings: every knob.
        metrics: where to count.
    """

    def __init__(
        self, service: Service, tokenizer: Callable[[], Tokenizer], settings: ServerSettings, metrics: Metrics
    ) -> None:
        self.service, self.settings, self.metrics = service, settings, metrics
        self.monitor = Monitor(settings.slo_classes)
        self._load_tokenizer = tokenizer
        self._tokenizer: asyncio.Future[Tokenizer] | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._draining = False
        self._feeds: set[Feed] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    # ---- where we stand --------------------------------------------------------------------------------------

    @property
    def state(self) -> ServiceState:
        """The service's state, or "draining" from the signal to stop on."""
        return "draining" if self._draining and self.service.state != "failed" else self.service.state

    @property
    def open_requests(self) -> int:
        """Generation requests being answered."""
        return len(self._feeds)

    async def stats(self) -> EngineStats:
        """The engine's numbers, or zeros while there is no engine."""
        try:
            return await self.service.stats()
        except HeadraceError:
            return EngineStats()

    def card(self) -> ModelCard:
        """The served model; raises :class:`EngineUnavailable` while there is none."""
        state = self.state
        if state == "failed":
            raise EngineUnavailable("the engine has failed and does not restart: see the server's log")
        if state == "draining":
            raise EngineUnavailable("the server is shutting down: send the request elsewhere or later")
        if state == "loading":
            raise EngineUnavailable("the model is still loading: try again in a moment")
        return self.service.card

    def check_model(self, name: str | None) -> ModelCard:
        """The card of the model called ``name`` (None: the served one); raises :class:`ModelNotFound`."""
        card = self.card()
        if name is not None and name != card.name:
            raise ModelNotFound(f"there is no model {name[:200]!r} here: this server has {card.name!r}", field="model")
        return card

    def fingerprint(self) -> str:
        """OpenAI's ``system_fingerprint``: changes with the server's version and the model."""
        card = self.service.card
        digest = hashlib.sha256(f"{__version__}|{card.path}|{card.dtype}|{card.created}".encode()).hexdigest()
        return f"fp_{digest[:12]}"

    # ---- work beside the event loop --------------------------------------------------------------------------

    async def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, loaded at the first call and by one caller only."""
        if self._tokenizer is None:
            self._tokenizer = asyncio.ensure_future(self.in_thread(self._load_tokenizer))
            self._tokenizer.add_done_callback(self._forget_failure)
        return await asyncio.shield(self._tokenizer)

    def _forget_failure(self, loaded: asyncio.Future[Tokenizer]) -> None:
        if loaded.cancelled() or loaded.exception() is not None:
            self._tokenizer = None  # the next request tries again

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Run ``work`` in one of a few threads, so that the event loop stays free."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.settings.tokenizer_threads, "headrace-tokenizer")
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def close(self) -> None:
        """Release the threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None

    # ---- open requests and the end ---------------------------------------------------------------------------

    def opened(self, feed: Feed) -> None:
        """Note an open request."""
        self._feeds.add(feed)
        self.monitor.opened(feed)
        self._idle.clear()

    def closed(self, feed: Feed) -> None:
        """Note its end."""
        self._feeds.discard(feed)
        self.monitor.closed(feed)
        if not self._feeds:
            self._idle.set()

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests, let open ones finish for ``timeout_s`` seconds, then end the rest with an error.

        Returns:
            True when every request came to its proper end.
        """
        self._draining = True
        finished = True
        try:
            async with asyncio.timeout(timeout_s):
                await self.service.drain(timeout_s)
                await self._idle.wait()
        except TimeoutError:
            finished = False
            log.warning("%d requests did not finish within %.0f s and are cut", len(self._feeds), timeout_s)
        for feed in tuple(self._feeds):
            finished = False
            feed.fail(EngineUnavailable("the server is shutting down", code="shutting_down"))
        if not finished:
            try:
                async with asyncio.timeout(2.0):
                    await self._idle.wait()
            except TimeoutError:
                log.warning("%d requests could not be told", len(self._feeds))
        return finished


def serving_of(request: Request) -> Serving:
    """The :class:`Serving` of the application that got ``request``."""
    serving: Serving = request.app.state.serving
    return serving


Server = Annotated[Serving, Depends(serving_of)]
