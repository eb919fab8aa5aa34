"""Server-sent events: an answer as it grows, to a client that may read slowly or leave."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from headrace.server.api.feed import Feed
from headrace.server.errors import body_of, encode, internal_error
from headrace.server.settings import ServerSettings

if TYPE_CHECKING:
    from headrace.server.api.shape import Shape

log = logging.getLogger(__name__)

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


def event(content: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + encode(content) + b"\n\n"


@contextlib.asynccontextmanager
async def watching(receive: Receive, on_leave: Callable[[], None]) -> AsyncIterator[None]:
    """Within the block, call ``on_leave`` when the client disconnects."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        on_leave()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watcher


class EventStream(Response):
    """A response that sends a feed's pieces as they come.

    Whatever has come in while the client was not reading goes out as one event per choice. An error after the first byte is
    sent as an ``error`` event, after which the stream ends without ``[DONE]``.
    """

    media_type = "text/event-stream"

    def __init__(
        self, feed: Feed, shape: Shape, *, include_usage: bool, continuous_usage: bool, settings: ServerSettings
    ) -> None:
        self._feed, self._shape, self._settings = feed, shape, settings
        self._include_usage, self._continuous_usage = include_usage, continuous_usage
        self.status_code = 200
        self.background = None
        self.body = b""
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with watching(receive, self._feed.abandon):
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await self._run(send)
        except (TimeoutError, OSError):
            log.info("a client stopped reading its stream; the request is cancelled")
        finally:
            await self._feed.close()

    async def _run(self, send: Send) -> None:
        feed = self._feed
        while not feed.done:
            news = await feed.wait(self._settings.keep_alive_s)
            if feed.gone:
                return
            await self._send(send, self._render() if news else KEEP_ALIVE)
        if feed.gone:
            return
        tail = self._render()
        if feed.error is not None:
            tail += event(body_of(feed.error))
        else:
            if self._include_usage:
                tail += event(self._shape.usage_chunk(feed.outcome().usage()))
            tail += DONE
        await self._send(send, tail)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _render(self) -> bytes:
        """The events for all that is new."""
        try:
            chunks = [chunk for piece in self._feed.take() for chunk in self._shape.chunks(piece)]
            if self._include_usage or self._continuous_usage:
                usage = self._feed.outcome().usage() if self._continuous_usage else None
                for chunk in chunks:
                    chunk["usage"] = usage
            return b"".join(map(event, chunks))
        except Exception:
            log.exception("an event could not be written")
            self._feed.fail(internal_error())
            return b""

    async def _send(self, send: Send, data: bytes) -> None:
        if not data:
            return
        async with asyncio.timeout(self._settings.write_timeout_s):
            await send({"type": "http.response.body", "body": data, "more_body": True})
