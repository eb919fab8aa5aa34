"""Requests from submission to end, without a server."""

from __future__ import annotations

import itertools
from typing import Any

from headrace.core.outputs import RequestTiming
from headrace.core.request import SLO, Request, SamplingParams
from headrace.server.api.outcome import Outcome
from headrace.server.dashboard.board import COLUMNS, Board


class Choice:
    def __init__(self, arrival: float) -> None:
        self.timing = RequestTiming(arrival)
        self.done = False


class Feed:
    """As much of a feed as the board looks at."""

    def __init__(self, name: str, arrival: float, slo: SLO = SLO(1000, 100), n: int = 1) -> None:
        params = SamplingParams(n=n, max_tokens=11)
        self.requests = (Request(name, (1, 2, 3), params, slo=slo, arrival=arrival, owner="ann"),)
        self.slo_class = "chat"
        self.choices = [Choice(arrival) for _ in range(n)]
        self.reasons = ["cancelled"] * n

    def outcome(self) -> Outcome:
        timings = [choice.timing for choice in self.choices if choice.timing.first_token is not None]
        tokens = sum(timing.decoded for timing in timings)
        return Outcome(3, tokens, 0, self.requests[0].slo, "chat", timings, self.reasons, drafted=4, accepted=1)


class Scene:
    """A board and its clock, which begins at 100."""

    def __init__(self, **sizes: int) -> None:
        self.now = 100.0
        numbers = itertools.count(1)
        self.board = Board(lambda: next(numbers), lambda: self.now, **sizes)

    def open(self, feed: Any) -> Any:
        self.board.opened(feed)
        return feed

    def seen(self, prefilling: dict[str, float] | None = None) -> list[dict[str, Any]]:
        return [dict(zip(COLUMNS, row, strict=True)) for row in self.board.open(prefilling or {})[0]]

    def ended(self, after: int = 0) -> list[dict[str, Any]]:
        return [dict(zip(COLUMNS, row, strict=True)) for row in self.board.ended(after)]


def test_the_life_of_a_request() -> None:
    scene = Scene()
    feed = scene.open(Feed("a", arrival=100.5))
    scene.now = 101.0
    (row,) = scene.seen()
    assert (row["phase"], row["standing"], row["arrival"], row["scheduled"], row["first"]) == (
        "queued",
        "met",
        0.5,
        None,
        None,
    )
    (row,) = scene.seen({"a": 100.9})
    assert (row["phase"], row["scheduled"]) == ("prefill", 0.9)
    scene.now = 101.4
    assert scene.seen({"a": 100.9})[0]["standing"] == "risk"
    feed.choices[0].timing = RequestTiming(100.5, first_scheduled=100.9, first_token=101.4, last_token=101.4, decoded=1)
    (row,) = scene.seen()
    assert (row["phase"], row["standing"], row["first"], row["ttft_ms"], row["end"]) == (
        "decode",
        "met",
        1.4,
        900.0,
        None,
    )
    feed.choices[0].timing.last_token, feed.choices[0].timing.decoded, feed.reasons = 102.4, 11, ["length"]
    scene.now = 102.4
    scene.board.closed(feed)
    assert scene.seen() == []
    (row,) = scene.ended()
    assert (row["phase"], row["standing"], row["end"], row["tpot_ms"], row["tokens"]) == (
        "finished",
        "met",
        2.4,
        100.0,
        11,
    )
    assert (row["number"], row["class"], row["prompt"], row["drafted"], row["accepted"]) == (1, "chat", 3, 4, 1)


def test_the_worst_choice_decides() -> None:
    scene = Scene()
    feed = scene.open(Feed("a", 100.0, n=2))
    feed.choices[0].timing = RequestTiming(100.0, first_token=100.1, last_token=100.85, decoded=9)
    feed.choices[0].done = True  # ended on time, and time goes on
    feed.choices[1].timing = RequestTiming(100.0, first_token=100.1, last_token=100.9, decoded=9)
    scene.now = 100.95
    assert scene.seen()[0]["standing"] == "met"
    scene.now = 101.05
    assert scene.seen()[0]["standing"] == "risk"


def test_endings() -> None:
    scene = Scene()
    for reasons in (["error"], ["cancelled"], ["stop"]):
        feed = scene.open(Feed("a", 100.0))
        feed.choices[0].timing = RequestTiming(100.0, first_token=100.1, last_token=100.1, decoded=1)
        feed.reasons = reasons
        scene.board.closed(feed)
        scene.board.closed(feed)  # harmless
    assert [(row["phase"], row["standing"]) for row in scene.ended()] == [
        ("failed", "missed"), ("cancelled", "none"), ("finished", "met"),
    ]  # fmt: skip


def test_bounded_whatever_comes() -> None:
    scene = Scene(ended_kept=4, open_shown=3)
    feeds = [scene.open(Feed(f"r{i}", 100.0)) for i in range(10)]
    rows, phases, standings = scene.board.open({"r0": 100.0, "r9": 100.0})
    assert [row[0] for row in rows] == [1, 2, 3]
    assert phases == {"prefill": 2, "queued": 8}  # all are counted
    assert sum(standings.values()) == 3
    for feed in feeds:
        scene.board.closed(feed)
    assert [row["number"] for row in scene.ended()] == [7, 8, 9, 10]
    assert [row["number"] for row in scene.ended(after=9)] == [10]


def test_nothing_of_whom_or_what() -> None:
    scene = Scene()
    scene.board.closed(scene.open(Feed("chatcmpl-secret", 100.0)))
    scene.open(Feed("chatcmpl-secret2", 100.0))
    text = str(scene.seen()) + str(scene.ended())
    assert "secret" not in text
    assert "ann" not in text
