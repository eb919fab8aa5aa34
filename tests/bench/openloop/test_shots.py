"""The load client against a server that misbehaves in every way, and rows held against figures worked out by hand."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest
from tests.bench.fake_server import FakeServer

from headrace.bench import metrics
from headrace.bench.openloop import client
from headrace.bench.openloop import shots as openloop
from headrace.bench.openloop.client import Answer, Punctuality
from headrace.bench.openloop.shots import Shot, over_http, row_of, shots_of
from headrace.bench.workloads.arrivals import Arrival
from headrace.core.request import SLO


@pytest.fixture
def server() -> Iterator[FakeServer]:
    made = FakeServer()
    yield made
    made.close()


def shot(number: int, at_s: float = 0.0, *, new: int = 5, kind: str = "", slo: SLO | None = None) -> Shot:
    arrival = Arrival(at_s, 3, new, slo=slo or SLO(), owner=kind, category="c")
    return Shot(str(number), at_s, (1, 2, number), new, arrival)


def test_every_token_is_counted_and_timed(server: FakeServer) -> None:
    ended: list[Any] = []
    done = over_http(server.url, "m", [shot(i, 0.01 * i) for i in range(5)], cutoff_s=20, on_row=ended.append)
    assert [r["id"] for r in done.rows] == list("01234")
    assert len(ended) == 5
    for row in done.rows:
        assert (row["finished"], row["decoded"], row["cached_tokens"], row["error"]) == (True, 5, 7, None)
        assert row["ttft_ms"] is not None
        assert row["tpot_ms"] is not None
        assert row["e2e_ms"] is not None
        assert 0 < row["ttft_ms"] < row["e2e_ms"]
        assert row["e2e_ms"] == pytest.approx(row["ttft_ms"] + 4 * row["tpot_ms"], abs=0.05)
    assert done.client["sent"] == 5


def test_times_between_tokens_are_told_where_they_are_wanted(server: FakeServer) -> None:
    done = over_http(server.url, "m", [shot(1), shot(2, new=1)], cutoff_s=20, gaps=True)
    assert {name: len(gaps) for name, gaps in done.gaps_ms.items()} == {"1": 4, "2": 0}
    assert sum(done.gaps_ms["1"]) == pytest.approx(4 * (done.rows[0]["tpot_ms"] or 0), abs=0.1)
    assert over_http(server.url, "m", [shot(1)], cutoff_s=20).gaps_ms == {}


def test_what_is_sent_is_greedy_streamed_and_of_exact_length(server: FakeServer) -> None:
    over_http(server.url, "m", [shot(1, new=4, slo=SLO(tpot_ms=50.0))], cutoff_s=20)
    (body,) = server.bodies
    assert (body["prompt"], body["max_tokens"], body["model"], body["temperature"]) == ([1, 2, 1], 4, "m", 0)
    assert body["ignore_eos"] is True
    assert body["stream"] is True
    assert body["slo"] == {"tpot_ms": 50.0}
    assert "priority" not in body


@pytest.mark.parametrize(
    ("kind", "error", "decoded"),
    [
        ("429", "HTTP 429: refused with 429", 0),
        ("500", "HTTP 500: refused with 500", 0),
        ("cut", "the stream was cut", 3),
        ("early", "the stream ended before its last token", 6),
        ("error", "the engine stopped", 3),
        ("nonsense", "no HTTP answer", 0),
        ("stuck", "cut off", 0),
    ],
)
def test_a_request_that_fails_costs_its_own_row(server: FakeServer, kind: str, error: str, decoded: int) -> None:
    bad, good = over_http(server.url, "m", [shot(0, kind=kind, new=6), shot(1, new=6)], cutoff_s=1.5).rows
    assert (bad["finished"], bad["decoded"]) == (False, decoded)
    assert error in str(bad["error"])  # type: ignore[typeddict-item]
    assert not metrics.attained(bad)
    assert good["finished"]


def test_a_stuck_server_does_not_hold_back_what_is_due(server: FakeServer) -> None:
    shots = [shot(i, 0.02 * i, kind="stuck") for i in range(40)]
    done = over_http(server.url, "m", shots, cutoff_s=3.0)
    assert len(server.bodies) == 40, "all of them went out although none was answered"
    assert [r["arrival_s"] for r in done.rows] == sorted(r["arrival_s"] for r in done.rows)
    assert all(r["arrival_s"] >= s.at_s for r, s in zip(done.rows, shots, strict=True))
    assert not any(r["finished"] for r in done.rows)


def test_a_closed_loop_keeps_so_many_open(server: FakeServer) -> None:
    done = over_http(server.url, "m", [shot(i, kind="stuck") for i in range(9)], cutoff_s=1.0, concurrency=3)
    assert len(server.bodies) == 3
    assert [r["id"] for r in done.rows] == ["0", "1", "2"], "who never had a turn has no row"


def test_nobody_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        done = over_http(url, "m", [shot(0)], cutoff_s=5)
    assert "ConnectionRefusedError" in str(done.rows[0]["error"])  # type: ignore[typeddict-item]


def test_a_client_that_dies_leaves_a_row_for_every_shot(monkeypatch: pytest.MonkeyPatch, server: FakeServer) -> None:
    monkeypatch.setattr(openloop, "PATIENCE_S", -18.0)
    done = over_http(server.url, "m", [shot(0, kind="stuck"), shot(1, 15.0)], cutoff_s=20)
    assert ["ended early" in str(r["error"]) for r in done.rows] == [True, True]  # type: ignore[typeddict-item]
    assert done.client == {}


def test_rows_by_hand() -> None:
    answer = {"at_s": 1.0, "sent_s": 1.002, "first_s": 1.102, "last_s": 1.502, "end_s": 1.6, "tokens": 5, "finished": True,
              "error": None, "engine_ttft_ms": 90.0}  # fmt: skip
    row: Any = row_of(shot(0, 1.0, slo=SLO(ttft_ms=101, tpot_ms=100.5)), answer)
    assert (row["ttft_ms"], row["tpot_ms"], row["e2e_ms"], row["lag_ms"]) == (100.0, 100.0, 500.0, 2.0)
    assert metrics.attained(row)
    assert not metrics.attained(row | {"slo_tpot_ms": 99.9})
    one: Any = row_of(shot(0, 1.0, slo=SLO(tpot_ms=1)), {**answer, "last_s": 1.102, "tokens": 1})
    assert one["tpot_ms"] is None
    assert metrics.attained(one), "a single token has no TPOT to miss"
    rows = [row, {**row, "arrival_s": 2.0, "end_s": 3.002, "decoded": 15, "ttft_ms": 200.0}]
    assert metrics.throughput(rows) == pytest.approx(20 / 2.0)
    assert metrics.goodput(rows) == pytest.approx(5 / 2.0)


def test_lateness_is_counted() -> None:
    row = Punctuality([0.1, 0.2, 7.0, 9.0], [0.0, 30.0]).row(2.0)
    assert (row["sent"], row["late"], row["lag_ms_max"]) == (4, 2, 9.0)
    assert Punctuality().row(0.0)["late"] == 0


def test_a_client_that_is_late_says_so(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a shot that was due before the clock began is late."""
    done = over_http(server.url, "m", [shot(0, -0.5), shot(1, 0.05)], cutoff_s=10)
    assert done.client["late"] >= 1
    assert done.rows[0]["lag_ms"] > 400  # type: ignore[typeddict-item]


def test_answers_take_lines_as_servers_send_them() -> None:
    answer = Answer("a", 0.0)
    for number, line in enumerate(
        [
            b"",
            b": ping",
            b'data:{"choices":[{"text":""}]}\r',
            b'data: {"choices": [{"finish_reason": "stop"}]}',
            b"data: [DONE]",
        ]
    ):
        answer.take(line, float(number))
    assert (answer.first_s, answer.last_s, answer.events, answer.finished) == (2.0, 3.0, 2, True)
    assert answer.row()["tokens"] == 2, "events, where the server counts nothing"


def test_shots_cut_texts_and_share_no_tokens_between_seeds() -> None:
    arrivals = [Arrival(0.0, 4, 2, text="a long text"), Arrival(1.0, 6, 2)]
    text, drawn = shots_of(arrivals, vocab_size=100, seed=1, tokenize=lambda t: list(range(len(t))))
    assert text.prompt == (0, 1, 2, 3)
    assert len(drawn.prompt) == 6
    assert shots_of(arrivals, vocab_size=100, seed=2)[1].prompt != drawn.prompt


def test_messages_of_any_form_are_told() -> None:
    assert client._message({"error": {"message": "m"}}) == "m"
    assert client._message({"error": "plain"}) == "plain"
    assert client._message(client._as_json(b"<html>")) == "<html>"
