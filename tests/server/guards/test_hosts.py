"""DNS rebinding: a page's own name for this server opens nothing."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest
from tests.server.conftest import Serve

from headrace.server.guards.hosts import AllowedHosts, host_of

HOME = ("127.0.0.1", 8000)
GOOD = [
    "127.0.0.1:8000",
    "localhost:1",
    "LOCALHOST",
    "[::1]:8000",
    "a.localhost",
    "localhost.",
    "10.1.2.3",
    socket.gethostname(),
]
BAD = [
    "evil.example",
    "evil.example:8000",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "notlocalhost",
    "x" * 300,
    "\xff",
]


def passes(host: str | None, *allowed: str, server: tuple[str, int] | None = HOME) -> bool:
    """Whether a request with ``host`` reaches the application."""
    reached = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope)

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [] if host is None else [(b"host", host.encode("latin-1"))]
    scope = {"type": "http", "server": server, "headers": headers, "method": "GET"}
    asyncio.run(AllowedHosts(app, allowed=allowed)(scope, None, send))  # type: ignore[arg-type]
    assert bool(reached) != any(message.get("status") == 403 for message in sent)
    return bool(reached)


@pytest.mark.parametrize("host", GOOD)
def test_good_over_loopback(host: str) -> None:
    assert passes(host)
    assert passes(host, "api.example.org")


@pytest.mark.parametrize("host", BAD)
def test_bad_over_loopback(host: str) -> None:
    assert not passes(host)
    assert passes(host, "*")


def test_loopback_is_an_address_of_the_connection_not_of_the_name() -> None:
    assert not passes("evil.example", server=("::1", 8000))
    assert not passes("evil.example", server=("127.0.1.1", 8000))
    assert passes("api.example.org", server=("10.0.0.5", 8000))
    assert passes("api.example.org", server=None)
    assert passes("api.example.org", server=("/run/headrace.sock", 0))
    assert passes(None), "no browser leaves it out, some health checks do"


def test_listed_names_hold_everywhere() -> None:
    assert passes("api.example.org:443", "API.example.org")
    assert passes("a.b.example.org", "*.example.org")
    assert not passes("example.org", "*.example.org")
    assert not passes("evil.example", "api.example.org", server=("10.0.0.5", 8000))


@pytest.mark.parametrize(
    ("value", "host"),
    [(b"a:1", "a"), (b"A.", "a"), (b"[::1]:80", "::1"), (b"[::1]", "::1"), (b"", ""), (b":80", ":80"), (b"a:b", "a:b")],
)
def test_names(value: bytes, host: str) -> None:
    assert host_of([(b"x", b"y"), (b"host", value)]) == host


def test_over_http(serve: Serve) -> None:
    http = serve().http()
    assert http.get("/health").status_code == 200
    reply = http.get("/health", headers={"host": "evil.example"})
    assert reply.status_code == 403
    assert reply.json()["error"]["code"] == "host_not_allowed"
    assert "--allowed-host" in reply.json()["error"]["message"]
    assert (
        serve(allowed_hosts=("evil.example",)).http().get("/health", headers={"host": "evil.example"}).status_code
        == 200
    )
