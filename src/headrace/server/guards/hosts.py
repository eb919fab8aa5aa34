"""Which names the server may be called by: a defence against DNS rebinding.

A web page can point a name of its own at 127.0.0.1 and then speak to a server on the reader's machine as if it were the
page's own. The browser still sends that name as ``Host``, so it is looked at: over a loopback connection only names that
nobody else can own are taken, over other connections any name unless some were listed.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable, Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from headrace.server.errors import HttpError, response_of

ANY = "*"


class AllowedHosts:
    """ASGI middleware: 403 for a ``Host`` that is not one of ours.

    Always good: addresses (no name server can turn them elsewhere), ``localhost`` and names below it, this machine's own
    name, and no ``Host`` at all, which no browser omits.

    Args:
        allowed: more names; ``*.example.org`` for all below one, ``*`` for all there are. Given any, they (and those above)
            are the only good ones over other connections too.
    """

    def __init__(self, app: ASGIApp, *, allowed: Sequence[str]) -> None:
        self._app = app
        self._any = ANY in allowed
        self._listed = bool(allowed)
        given = {name.lower().rstrip(".") for name in allowed} | {"localhost", socket.gethostname().lower()}
        self._names = frozenset(name for name in given if not name.startswith("*."))
        self._endings = (".localhost", *(name[1:] for name in given if name.startswith("*.")))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._any or not (self._listed or _over_loopback(scope)):
            await self._app(scope, receive, send)
            return
        host = host_of(scope["headers"])
        if self._good(host):
            await self._app(scope, receive, send)
            return
        shown = host[:100].encode("ascii", "replace").decode("ascii")
        error = HttpError(
            403,
            f"this server is not called {shown!r}: use its address or localhost, or start it with --allowed-host NAME",
            code="host_not_allowed",
            field="Host",
        )
        await response_of(error)(scope, receive, send)

    def _good(self, host: str) -> bool:
        return not host or host in self._names or host.endswith(self._endings) or _is_address(host)


def host_of(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The name in ``Host``: lower case, without port, brackets or a final dot; empty when there is none."""
    value = next((value for key, value in headers if key == b"host"), b"").decode("latin-1").strip().lower()
    if value.startswith("["):
        return value[1:].partition("]")[0]
    name, _, port = value.rpartition(":")
    return (name if name and port.isdigit() else value).rstrip(".")


def _over_loopback(scope: Scope) -> bool:
    server = scope.get("server")
    try:
        return server is not None and ipaddress.ip_address(server[0]).is_loopback
    except ValueError:  # a socket's path, or a test's name
        return False


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
