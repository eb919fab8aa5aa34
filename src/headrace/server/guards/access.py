"""The outermost layer: request ids, the access log, counting, and the last line of defence against our own defects."""

from __future__ import annotations

import logging
import re
import time
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headrace.server.errors import internal_error, response_of
from headrace.server.metrics.exposition import Metrics

log = logging.getLogger(__name__)
access_log = logging.getLogger("headrace.access")

CLIENT_LEFT = 499
"""What the log and the metrics say when nobody waited for a status (nginx's number)."""

_GOOD_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


class Access:
    """ASGI middleware. Takes the client's ``X-Request-Id`` when it is a plain word, else makes one, and answers with it."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, enabled: bool) -> None:
        self._app, self._metrics, self._enabled = app, metrics, enabled

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["arrival"] = started = time.monotonic()
        name = _request_id(scope)
        status = 0

        async def tagged(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", name.encode())]}
            await send(message)

        try:
            await self._app(scope, receive, tagged)
        except Exception:
            log.exception("request %s failed", name)
            if status == 0:
                await response_of(internal_error())(scope, receive, tagged)
        finally:
            status = status or CLIENT_LEFT
            self._metrics.count_http(_endpoint(scope), _method(scope), status)
            if self._enabled and not (state.get("quiet") and status < 400):
                self._write(scope, name, status, time.monotonic() - started)

    def _write(self, scope: Scope, name: str, status: int, seconds: float) -> None:
        client = (scope.get("client") or ("-",))[0]
        path = scope["path"][:200].encode("unicode_escape").decode("ascii")  # no line breaks from clients
        state = scope["state"]
        access_log.info(
            "%s %s %s %d %.1fms %s%s %s",
            client, scope["method"], path, status, seconds * 1e3, name, _label(state.get("owner", "")), state.get("note", ""),
        )  # fmt: skip


def _label(owner: str) -> str:
    return f" key={owner}" if owner else ""


def _request_id(scope: Scope) -> str:
    offered = next((value for key, value in scope["headers"] if key == b"x-request-id"), b"")
    return offered.decode("ascii") if _GOOD_ID.fullmatch(offered) else f"req_{uuid.uuid4().hex}"


def _endpoint(scope: Scope) -> str:
    """The route's template: a metric's label must not be a text that clients can make up."""
    path = getattr(scope.get("route"), "path", None)
    return path if isinstance(path, str) else "none"


def _method(scope: Scope) -> str:
    return (
        scope["method"] if scope["method"] in ("GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE") else "other"
    )
