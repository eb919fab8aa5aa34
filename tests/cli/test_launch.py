"""The watch over the engine, without one."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from headrace.cli.launch import Launch, _classes, _quantised
from headrace.core.config import EngineConfig
from headrace.core.errors import BrokenCheckpoint, EngineUnavailable
from headrace.core.outputs import EngineStats
from headrace.core.protocols import ModelCard, Quality
from headrace.core.request import SLO
from headrace.server import ServerSettings
from headrace.server.slo.classes import SLOClasses


class Service:
    """Becomes ready or raises ``problem``; ``dies_after`` answers about its state it has failed."""

    card = ModelCard("fake", "", 100, 97, (0,))

    def __init__(self, problem: Exception | None = None, dies_after: int = 10**9) -> None:
        self._problem, self._looks, self._dies_after = problem, 0, dies_after

    async def ready(self) -> None:
        if self._problem is not None:
            raise self._problem
        if self._looks >= self._dies_after:
            raise EngineUnavailable("the engine died 6 times")

    @property
    def state(self) -> str:
        self._looks += 1
        return "failed" if self._looks >= self._dies_after else "ready"

    async def stats(self) -> EngineStats:
        return EngineStats(slots_total=1234)


def watched(service: Service, monkeypatch: pytest.MonkeyPatch, tokenizer: Exception | None = None) -> Launch:
    """A launch whose watch has ended."""
    monkeypatch.setattr("headrace.cli.launch.WATCH_S", 0.001)
    monkeypatch.setattr("headrace.cli.launch._import_tokenizers", lambda: None)
    launch = Launch(EngineConfig(), ServerSettings())

    async def load() -> None:
        if tokenizer is not None:
            raise tokenizer

    parts: Any = launch
    parts._service, parts._server = service, SimpleNamespace(should_exit=False)
    parts._serving = SimpleNamespace(tokenizer=load)
    asyncio.run(asyncio.wait_for(launch._watch(), 10))
    assert parts._server.should_exit
    return launch


def test_an_engine_that_cannot_load_stops_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = BrokenCheckpoint("the file is truncated")
    assert watched(Service(problem), monkeypatch).failure is problem


def test_an_engine_that_is_lost_later_stops_the_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launch = watched(Service(dies_after=3), monkeypatch)
    assert isinstance(launch.failure, EngineUnavailable)
    assert "1,234 slots" in capsys.readouterr().err  # it had been ready


def test_a_tokenizer_that_cannot_be_read_stops_the_server_whatever_it_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = OSError("disk")
    assert watched(Service(), monkeypatch, tokenizer=problem).failure is problem


@pytest.mark.parametrize(
    ("card", "says"),
    [
        (ModelCard("m", "", 9, 9, ()), ""),
        (ModelCard("m", "", 9, 9, (), kv_cache_dtype="float32"), ""),
        (ModelCard("m", "", 9, 9, (), quantization="nf4"), "  rounded  nf4 weights\n"),
        (
            ModelCard(
                "m", "", 9, 9, (), quantization="int8", kv_cache_dtype="int8", quality=Quality(300, 3.0, 3.0125, 0.97)
            ),
            "  rounded  int8 weights, int8 K and V: 3.000 to 3.013 nats a token (+0.0125), "
            "97.0% of 300 likeliest tokens the same\n",
        ),
    ],
)
def test_what_was_rounded_is_told_with_its_cost(card: ModelCard, says: str) -> None:
    assert _quantised(card) == says


def test_classes_are_told_with_their_targets() -> None:
    assert _classes(SLOClasses()) == ""
    known = SLOClasses({"bulk": SLO(), "chat": SLO(1000, 50), "code": SLO(None, 12.5)}, "chat")
    assert _classes(known) == (
        "  classes  chat (first token in 1000 ms, 50 ms a token), bulk (no target), code (12.5 ms a token); "
        "requests that name none are chat\n"
    )
    assert _classes(SLOClasses({"bulk": SLO()})).startswith("  classes  none (no target), bulk (no target); ")
