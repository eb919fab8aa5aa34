"""Starting, draining and stopping."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from tests.server.conftest import Running, Serve, eventually
from tests.server.fake_service import FakeService

from headrace.server import ServerSettings, create_app, run_server
from headrace.server.run import build_server

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def open_stream(running: Running, tokens: int) -> Iterator[Iterator[str]]:
    """The events of a streamed completion, the first of which has been read."""
    request = {"prompt": "x" * tokens, "max_tokens": tokens, "stream": True, "ignore_eos": True}
    with running.http().stream("POST", "/v1/completions", json=request) as reply:
        events = (line for line in reply.iter_lines() if line)
        next(events)
        yield events


def test_drain_finishes_open_streams_and_refuses_new_requests(serve: Serve) -> None:
    running = serve(FakeService(delay_s=0.02))
    http = running.http()
    with open_stream(running, 50) as events:
        running.begin_drain()
        assert eventually(lambda: http.get("/health").json()["state"] == "draining")
        assert http.get("/health").status_code == 503
        refused = http.post("/v1/completions", json={"prompt": "a"})
        rest = list(events)
    assert refused.status_code == 503
    assert "shutting down" in refused.json()["error"]["message"]
    assert rest.pop() == "data: [DONE]"
    texts = [json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in rest]
    assert 40 < len("".join(texts)) < 50, "all that followed the first event"
    assert running.join(10)


def test_drain_cuts_what_takes_too_long_and_says_so(serve: Serve) -> None:
    service = FakeService(delay_s=0.05)
    running = serve(service, drain_timeout_s=0.5)
    with open_stream(running, 1000) as events:
        running.begin_drain()
        rest = list(events)
    assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "shutting_down"
    assert "data: [DONE]" not in rest
    assert running.join(10)
    assert not service.live


def test_idle_server_stops_at_once(serve: Serve) -> None:
    running = serve(drain_timeout_s=30)
    running.http().get("/health")  # leaves an idle connection behind
    start = time.monotonic()
    running.begin_drain()
    assert running.join(10)
    assert time.monotonic() - start < 5


def test_drain_while_loading(serve: Serve) -> None:
    running = serve(FakeService(state="loading"))
    running.begin_drain()
    assert running.join(10)


@pytest.fixture
def program(tmp_path: Path, byte_tokenizer) -> Iterator[Callable[..., tuple[subprocess.Popen[str], str]]]:
    """Start ``serve_fake.py``; gives the process and its URL."""
    started: list[subprocess.Popen[str]] = []

    def start(delay: float, timeout: float) -> tuple[subprocess.Popen[str], str]:
        arguments = [str(byte_tokenizer.path), str(delay), str(timeout), "0"]
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.server.serve_fake", *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "background entered\n"
        return process, process.stdout.readline().strip()

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_signal_drains_and_exits_with_zero(program) -> None:
    process, url = program(0.02, 30)
    request = {"prompt": "x" * 60, "max_tokens": 60, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=request, timeout=30, trust_env=False) as reply:
        events = (line for line in reply.iter_lines() if line)
        next(events)
        process.send_signal(signal.SIGTERM)
        rest = list(events)
    assert rest[-1] == "data: [DONE]"
    out, err = process.communicate(timeout=15)
    assert process.returncode == 0, err
    assert out == "background left\nended\n"
    assert "Traceback" not in err


def test_second_signal_ends_at_once(program) -> None:
    process, url = program(0.1, 60)
    request = {"prompt": "x" * 1000, "max_tokens": 1000, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=request, timeout=30, trust_env=False) as reply:
        next(reply.iter_lines())
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None, "the first signal waits for the stream"
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        process.wait(10)
        assert time.monotonic() - start < 6


def test_port_in_use_is_told_by_the_result(caplog) -> None:
    app = create_app(FakeService(), lambda: None, ServerSettings())  # type: ignore[arg-type, return-value]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert run_server(app, port=taken.getsockname()[1]) is False
    assert "address already in use" in caplog.text


def test_open_address_without_keys_is_warned_of(caplog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.server.run.GracefulServer.run", lambda self: None)
    caplog.set_level(logging.WARNING)
    for host, keys, warned in (("0.0.0.0", (), True), ("0.0.0.0", (("a", "k"),), False), ("127.0.0.1", (), False)):
        caplog.clear()
        app = create_app(FakeService(), lambda: None, ServerSettings(api_keys=keys))  # type: ignore[arg-type, return-value]
        run_server(app, host=host)
        assert ("without API keys" in caplog.text) is warned


def test_loopback_is_the_default() -> None:
    app = create_app(FakeService(), lambda: None)  # type: ignore[arg-type, return-value]
    assert build_server(app).config.host == "127.0.0.1"
