"""Bodies that are too large or too slow, and too many requests at once."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator

import httpx
import psutil
import pytest
from tests.server.conftest import Running, Serve, eventually
from tests.server.fake_service import MODEL, FakeService

MIB = 1 << 20


def chunks(total: int, sent: list[int]) -> Iterator[bytes]:
    block = b"x" * MIB
    for _ in range(total // MIB):
        sent.append(MIB)
        yield block


@pytest.mark.parametrize("with_length", [True, False], ids=["content-length", "chunked"])
def test_hundred_megabytes_are_refused_without_being_held(serve: Serve, with_length: bool) -> None:
    running = serve()
    http = running.http()
    assert http.get("/health").status_code == 200
    process = psutil.Process()
    before, highest, sent = process.memory_info().rss, 0, []

    def body() -> Iterator[bytes]:
        nonlocal highest
        for block in chunks(100 * MIB, sent):
            highest = max(highest, process.memory_info().rss)
            yield block

    headers = {"content-type": "application/json"}
    if with_length:
        headers["content-length"] = str(100 * MIB)
    start = time.monotonic()
    reply = http.post("/v1/chat/completions", content=body(), headers=headers)
    assert reply.status_code == 413
    assert reply.json()["error"]["code"] == "request_too_large"
    assert time.monotonic() - start < 20
    assert highest - before < 40 * MIB
    assert http.get("/health").status_code == 200


def test_answer_to_a_large_body_comes_before_the_body(serve: Serve) -> None:
    running = serve()
    with connect(running) as connection:
        connection.sendall(head(running, "Content-Length: 1000000000"))
        assert b" 413 " in connection.recv(4096).split(b"\r\n")[0]


def test_expect_continue_is_refused_without_a_body(serve: Serve) -> None:
    running = serve()
    with connect(running) as connection:
        connection.sendall(head(running, "Content-Length: 1000000000\r\nExpect: 100-continue"))
        received = b""
        while part := connection.recv(4096):
            received += part
    assert b" 413 " in received.split(b"\r\n")[0]
    assert b"100 Continue" not in received


def test_largest_allowed_body_passes(serve: Serve) -> None:
    http = serve(max_body_bytes=1000).http()
    body = json.dumps({"model": MODEL, "prompt": "a"}).encode()
    exact = body + b" " * (1000 - len(body))
    headers = {"content-type": "application/json"}
    assert http.post("/v1/completions", content=exact, headers=headers).status_code == 200
    assert http.post("/v1/completions", content=exact + b" ", headers=headers).status_code == 413
    assert http.post("/v1/completions", content=iter([exact, b" "]), headers=headers).status_code == 413
    assert http.post("/v1/completions", content=iter([exact[:500], exact[500:]]), headers=headers).status_code == 200


def test_slow_body(serve: Serve) -> None:
    running = serve(body_timeout_s=0.3)
    with connect(running) as connection:
        connection.sendall(head(running, "Content-Length: 100") + b'{"model":')
        assert b" 408 " in connection.recv(4096).split(b"\r\n")[0]


def test_body_that_breaks_off(serve: Serve) -> None:
    service = FakeService()
    running = serve(service)
    with connect(running) as connection:
        connection.sendall(head(running, "Content-Length: 100") + b'{"model":')
    assert running.http().get("/health").status_code == 200
    assert not service.seen


def test_too_many_open_requests(serve: Serve) -> None:
    service = FakeService(say=lambda request, index: b"x" * 10_000, delay_s=0.01, context=20_000)
    running = serve(service, max_open_requests=2)
    http = running.http()
    request = {"prompt": "a", "max_tokens": 5000, "stream": True}
    with http.stream("POST", "/v1/completions", json=request), http.stream("POST", "/v1/completions", json=request):
        refused = http.post("/v1/completions", json={"prompt": "a"})
        assert refused.status_code == 429
        assert refused.headers["retry-after"]
        assert http.get("/health").status_code == 200, "health must answer all the same"
    assert eventually(lambda: not service.live)
    assert eventually(lambda: http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200)


def test_cors_is_off_by_default_and_can_be_allowed(serve: Serve) -> None:
    asks = {"origin": "https://a.example", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in serve().http().options("/v1/completions", headers=asks).headers
    running = serve(cors_origins=("https://a.example",), api_keys=(("a", "k"),))
    allowed = running.http().options("/v1/completions", headers=asks)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://a.example"
    other = running.http().options("/v1/completions", headers={**asks, "origin": "https://b.example"})
    assert "access-control-allow-origin" not in other.headers


def connect(running: Running) -> socket.socket:
    return socket.create_connection(("127.0.0.1", httpx.URL(running.url).port or 0), timeout=10)


def head(running: Running, fields: str) -> bytes:
    return f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{fields}\r\n\r\n".encode()
