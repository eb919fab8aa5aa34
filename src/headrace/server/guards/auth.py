"""API keys. Every path needs one unless it is listed as open, so that a route added later is protected by default."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from headrace.server.dashboard import routes as dashboard
from headrace.server.errors import HttpError, response_of
from headrace.server.settings import digest

OPEN_PATHS = frozenset({"/health", "/version", "/openapi.json"}) | dashboard.OPEN_PATHS


class Authentication:
    """ASGI middleware: 401 without a known key in ``Authorization: Bearer``; puts the key's label into the request's state.

    The digests of all keys are compared in constant time and without stopping at a match, so that answer times tell nothing
    about the keys.
    """

    def __init__(self, app: ASGIApp, *, digests: Sequence[tuple[str, bytes]], protect_metrics: bool) -> None:
        self._app, self._digests = app, tuple(digests)
        self._open = OPEN_PATHS if protect_metrics else OPEN_PATHS | {"/metrics"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._digests:
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        owner = None if path in self._open else self.owner(scope["headers"])
        if owner is None and path not in self._open:
            error = HttpError(
                401,
                "the API key is missing or wrong: send Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
            await response_of(error)(scope, receive, send)
            return
        scope.setdefault("state", {})["owner"] = owner or ""
        await self._app(scope, receive, send)

    def owner(self, headers: Sequence[tuple[bytes, bytes]]) -> str | None:
        """The label of the key in ``headers``, or None."""
        value = next((value for key, value in headers if key == b"authorization"), b"")
        scheme, _, key = value.partition(b" ")
        offered = digest(key.strip())
        found = None
        for label, known in self._digests:
            if hmac.compare_digest(offered, known) and scheme.lower() == b"bearer":
                found = label
        return found
