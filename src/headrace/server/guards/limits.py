"""What a request body may be: JSON, not too large, not too slow. Enforced while it arrives."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headrace.core.errors import HeadraceError, Overloaded
from headrace.server.errors import HttpError, response_of

LINGER_BYTES = 256 << 20
LINGER_S = 5.0


class BodyLimits:
    """ASGI middleware: 413 for a body too large, 408 for one too slow, 429 beyond ``max_open`` requests.

    A body is held in memory only up to ``max_bytes``; what comes after is thrown away as it arrives, for a short while, so
    that a client which only reads after writing gets to see the answer.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int, timeout_s: float, max_open: int) -> None:
        self._app, self._max_bytes, self._timeout_s, self._max_open = app, max_bytes, timeout_s, max_open
        self._open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        self._open += 1
        try:
            body = await self._checked_body(scope, receive)
        except HeadraceError as error:
            await self._refuse(error, scope, receive, send)
        else:
            if body is not None:
                await self._app(scope, _replay(body, receive), send)
        finally:
            self._open -= 1

    async def _checked_body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body, or None when the client left before it was complete."""
        if self._open > self._max_open:
            raise Overloaded(f"{self._max_open} requests are open, as many as the server takes: try again later")
        length = _header(scope["headers"], b"content-length")
        if length.isdigit() and int(length[:20]) > self._max_bytes:
            raise self._too_large()
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._read(receive)
        except TimeoutError:
            raise HttpError(
                408, f"the body did not arrive within {self._timeout_s:g} s", code="request_timeout"
            ) from None

    async def _read(self, receive: Receive) -> bytes | None:
        chunks, size = [], 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return None
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > self._max_bytes:
                raise self._too_large()
            chunks.append(chunk)
            if not message.get("more_body", False):
                return b"".join(chunks)

    def _too_large(self) -> HttpError:
        return HttpError(
            413, f"the body is larger than {self._max_bytes} bytes: send less at once", code="request_too_large"
        )

    async def _refuse(self, error: HeadraceError, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer at once and in full, then discard the rest of the body before the connection is closed."""
        response = response_of(error)
        response.headers["connection"] = "close"
        await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
        await send({"type": "http.response.body", "body": bytes(response.body), "more_body": True})
        expects = _header(scope["headers"], b"expect").lower() == b"100-continue"
        if not expects and _has_body(scope["headers"]):
            await _discard(receive)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _discard(receive: Receive) -> None:
    left = LINGER_BYTES
    try:
        async with asyncio.timeout(LINGER_S):
            while left > 0:
                message = await receive()
                left -= len(message.get("body", b""))
                if message["type"] != "http.request" or not message.get("more_body", False):
                    return
    except TimeoutError:
        return


async def require_json(request: Request) -> None:
    """Dependency of routes with a body: 415 for what is no JSON.

    Insisting on the media type keeps web pages from posting to a local server without asking first (CORS).
    """
    media = _header(request.headers.raw, b"content-type").split(b";")[0].strip().lower()
    if media == b"application/json" or (media.startswith(b"application/") and media.endswith(b"+json")):
        return
    raise HttpError(415, "send the body as Content-Type: application/json", code="unsupported_media_type")


def _has_body(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    return _header(headers, b"content-length") not in (b"", b"0") or _header(headers, b"transfer-encoding") != b""


def _header(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes:
    return next((value for key, value in headers if key == name), b"")


def _replay(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that gives ``body`` in one message and then whatever the connection says (a disconnect)."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return waiting.pop() if waiting else await receive()

    return replayed
