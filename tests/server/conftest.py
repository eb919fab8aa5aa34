"""A real server on a loopback port, in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.server.fake_service import FakeService, write_byte_tokenizer

from headrace.compose import build_service
from headrace.core.config import EngineConfig
from headrace.models.text.tokenizer import Tokenizer
from headrace.server import ServerSettings, create_app
from headrace.server.run import GracefulServer, build_server


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Token ``i`` is byte ``i``."""
    return Tokenizer(write_byte_tokenizer(tmp_path_factory.mktemp("bytes")))


class Running:
    """A server that listens; ``service`` is what it serves."""

    def __init__(self, service: Any, tokenizer: Callable[[], Tokenizer], settings: ServerSettings, **more: Any) -> None:
        self.service = service
        self.app = create_app(service, tokenizer, settings, **more)
        listening = threading.Event()
        self.server: GracefulServer = build_server(self.app, port=0, on_listen=lambda url: listening.set())
        self._thread = threading.Thread(target=self.server.run, daemon=True)
        self._thread.start()
        assert listening.wait(20), "the server did not start"
        self.url = self.server.url

    @property
    def serving(self) -> Any:
        return self.app.state.serving

    def client(self, key: str = "none", **options: Any) -> openai.OpenAI:
        http = httpx.Client(verify=False, trust_env=False, timeout=30)  # no TLS here: spare the loading of certificates
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, http_client=http, **options)

    def http(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30, verify=False, trust_env=False, **options)

    def begin_drain(self) -> None:
        loop = self.server._loop
        assert loop is not None
        loop.call_soon_threadsafe(self.server.begin_drain)

    def join(self, timeout: float) -> bool:
        """True when the server has ended."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def stop(self) -> None:
        self.server.should_exit = True
        assert self.join(10), "the server did not stop"

    def ready(self, timeout_s: float = 120.0) -> Running:
        """Wait until requests are served."""
        http = self.http()
        assert eventually(lambda: http.get("/health").status_code == 200, timeout_s, 0.2), "the model did not load"
        return self

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics: ``name{label=value,...}`` -> value."""
        found = {}
        for family in text_string_to_metric_families(self.http().get("/metrics").text):
            for sample in family.samples:
                labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
                found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
        return found


Serve = Callable[..., Running]


@pytest.fixture(scope="session")
def real() -> Iterator[Running]:
    """The bundled model behind a real engine in its own process."""
    service = build_service(EngineConfig(threads=1, max_context=1024, kv_gib=0.1))

    @contextlib.asynccontextmanager
    async def background() -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.close()

    settings = ServerSettings(drain_timeout_s=5)
    running = Running(service, lambda: Tokenizer(service.card.path), settings, background=background)
    yield running.ready()
    running.stop()


@pytest.fixture
def serve(byte_tokenizer: Tokenizer) -> Iterator[Serve]:
    """Start servers: ``serve(FakeService(...), api_keys=...)``; they stop with the test."""
    started: list[Running] = []

    def start(service: Any = None, *, tokenizer: Callable[[], Tokenizer] | None = None, **settings: Any) -> Running:
        running = Running(service or FakeService(), tokenizer or (lambda: byte_tokenizer), ServerSettings(**settings))
        started.append(running)
        return running

    yield start
    for running in started:
        running.stop()


def eventually(condition: Callable[[], bool], timeout_s: float = 5.0, pause_s: float = 0.02) -> bool:
    """Wait until ``condition`` holds, looking every ``pause_s`` seconds."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(pause_s)
    return condition()


def gather(*calls: Callable[[], Any]) -> list[Any]:
    """Run blocking calls side by side."""

    async def run() -> list[Any]:
        return list(await asyncio.gather(*(asyncio.to_thread(call) for call in calls)))

    return asyncio.run(run())
