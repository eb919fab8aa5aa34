"""Sweeps: rates by hand, pieces in turn, and systems that die, refuse or fall behind cost their rows and not the run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from tests.bench.fake_server import FakeServer

from headrace.bench.openloop.loads import Lone, Model, drawn_load
from headrace.bench.openloop.shots import OnRow, Replayed, Shot, row_of
from headrace.bench.openloop.sweep import LostSystem, Pace, Sweep, by_point, figures, lone_row, steady_rate
from headrace.bench.openloop.systems import HTTPSystem, SessionSystem
from headrace.core.errors import HeadraceError

LONE = Lone(50.0, 20.0)
PACE = Pace(fractions=(0.5, 1.0), seeds=(0, 1), seconds=2.0, grace_s=1.0, saturate_s=1.0, concurrency=4, lone=3)


class Still:
    """A process that only notes whether it runs."""

    def __init__(self) -> None:
        self.runs = True

    def pause(self) -> None:
        self.runs = False

    def resume(self) -> None:
        self.runs = True

    def close(self) -> None:
        self.runs = False


class FakeSystem:
    """Answers at once, or as ``share`` of the requests, or dies at its ``dies``-th replay."""

    def __init__(
        self, name: str, order: list[str], *, share: float = 1.0, dies: int | None = None, gone: bool = False
    ) -> None:
        self.name, self.process, self._order = name, Still(), order
        self._share, self._dies, self._gone = share, dies, gone

    def replay(self, shots: Sequence[Shot], *, cutoff_s: float, on_row: OnRow = lambda row: None) -> Replayed:
        assert self.process.runs
        self._order.append(self.name)
        if self._dies is not None and self._order.count(self.name) > self._dies:
            raise HeadraceError("it died")
        rows = []
        for place, shot in enumerate(shots):
            good = place < self._share * len(shots) and not self._gone
            end = shot.at_s + 0.5 if good else cutoff_s
            error = "ConnectionRefusedError: no" if self._gone else None if good else "cut off"
            rows.append(row_of(shot, {
                "at_s": shot.at_s, "sent_s": shot.at_s, "first_s": shot.at_s + 0.1 if good else None, "last_s": end if good else None,
                "end_s": end, "tokens": shot.new if good else 0, "finished": good, "error": error,
            }))  # fmt: skip
        return Replayed(rows, {"sent": len(shots), "late": 0})


def sweep_of(systems: Sequence[Any], pace: Pace = PACE) -> Sweep:
    sweep = Sweep(Model(100, 64), pace, 0, [])
    sweep.run(systems, drawn_load(64, seed=0), 10.0, LONE)
    return sweep


def test_every_system_gets_the_same_pieces_in_turn() -> None:
    order: list[str] = []
    sweep = sweep_of([FakeSystem("headrace", order), FakeSystem("peer", order)])
    assert [set(order[i : i + 2]) for i in range(0, 8, 2)] == [{"headrace", "peer"}] * 4
    assert len(set(order[::2])) == 2, "nobody always begins"
    assert len(sweep.cases) == 4
    points = by_point(sweep.rows)
    mine, theirs = points["poisson", "headrace", 0.5], points["poisson", "peer", 0.5]
    keys = ("arrival_s", "prompt_tokens", "output_tokens", "slo_tpot_ms", "seed")
    assert [[r[k] for k in keys] for r in mine] == [[r[k] for k in keys] for r in theirs]
    runs = [r for r in sweep.rows if r["kind"] == "run"]
    assert {r["rate"] for r in runs} == {5.0, 10.0}
    assert all(r["context"] == 64 and r["prompt_scale"] < 1 for r in runs), "scaling is said in the rows"


def test_each_round_goes_through_all_rates_with_something_between() -> None:
    first = FakeSystem("headrace", [])
    peer = FakeSystem("peer", [])
    seen: list[tuple[bool, bool]] = []
    sweep = Sweep(Model(100, 64), PACE, 0, [])
    sweep.run(
        [first, peer], drawn_load(64, seed=0), 10.0, LONE,
        between=lambda: seen.append((first.process.runs, peer.process.runs)),
    )  # fmt: skip
    assert [(case.seed, case.fraction) for case in sweep.cases] == [(0, 0.5), (0, 1.0), (1, 0.5), (1, 1.0)]
    assert seen == [(True, False)] * 4


def test_a_spent_budget_begins_no_further_round() -> None:
    sweep = sweep_of([FakeSystem("headrace", [])], replace(PACE, budget_s=0.0))
    assert [(case.seed, case.fraction) for case in sweep.cases] == [(0, 0.5), (0, 1.0)]
    assert [r["reason"] for r in sweep.rows if r["kind"] == "skipped"] == ["no time left for piece 2 of each rate"]


def test_no_two_pieces_share_prompts() -> None:
    sweep = sweep_of([FakeSystem("headrace", [])])
    prompts = [shot.prompt for case in sweep.cases for shot in case.shots]
    assert len(set(prompts)) == len(prompts)


def test_a_system_that_dies_is_left_out_and_the_others_go_on() -> None:
    order: list[str] = []
    sweep = sweep_of([FakeSystem("headrace", order), FakeSystem("peer", order, dies=1)])
    assert order.count("headrace") == 4
    assert order.count("peer") == 2
    (skipped,) = [r for r in sweep.rows if r["kind"] == "skipped"]
    assert (skipped["system"], skipped["reason"]) == ("peer", "lost: it died")


def test_a_server_that_is_gone_is_noticed() -> None:
    order: list[str] = []
    sweep = sweep_of([FakeSystem("headrace", order), FakeSystem("peer", order, gone=True)])
    assert order.count("peer") == 1
    assert "ConnectionRefused" in next(r["reason"] for r in sweep.rows if r["kind"] == "skipped")


def test_a_peer_that_falls_behind_is_not_asked_at_higher_rates() -> None:
    order: list[str] = []
    sweep = sweep_of([FakeSystem("headrace", order, share=0.3), FakeSystem("peer", order, share=0.3)])
    assert order.count("peer") == 2, "both pieces of the first rate"
    assert order.count("headrace") == 4, "ours is always shown to the end"
    assert any("higher rates are left out" in r.get("reason", "") for r in sweep.rows)


def test_steady_rate_by_hand() -> None:
    def row(arrival: float, first: float | None, end: float, decoded: int) -> dict[str, Any]:
        ttft = None if first is None else (first - arrival) * 1e3
        return {"arrival_s": arrival, "ttft_ms": ttft, "end_s": end, "decoded": decoded, "finished": end < 4.0}

    rows = [
        row(0.0, 0.0, 2.0, 20),  # half of it before the warm-up's end at 1 s
        row(0.5, 1.5, 2.5, 10),
        row(3.0, 3.5, 4.5, 8),  # half of it after the end
        row(3.0, 3.9, 3.9, 1),
        row(3.0, None, 4.0, 0),
        row(0.0, 0.1, 0.9, 100),
    ]
    assert steady_rate(rows, 4.0) == pytest.approx((10 + 10 + 4 + 1) / 3.0)
    assert steady_rate([], 4.0) == 0.0
    assert steady_rate([row(0.0, 0.0, 2.0, 20)], 4.0) == pytest.approx(10.0), "nothing was left to send after 2 s"


def test_rates_of_a_point_are_medians_over_its_pieces() -> None:
    def row(seed: int, decoded: int) -> dict[str, Any]:
        return {
            "seed": seed, "arrival_s": 0.0, "end_s": 1.0, "decoded": decoded, "finished": True, "ttft_ms": 1.0, "tpot_ms": 1.0,
            "e2e_ms": 2.0, "slo_ttft_ms": None, "slo_tpot_ms": None, "prompt_tokens": 1, "cached_tokens": 0, "preemptions": 0,
        }  # fmt: skip

    found = figures([row(0, 10), row(1, 30), row(2, 500)])
    assert found["throughput_tok_s"] == 30.0
    assert found["requests"] == 3


def test_lone_rows_are_medians_and_tell_what_passes_outside_the_engine() -> None:
    done = [
        {"ttft_ms": t, "tpot_ms": 2.0, "engine_ttft_ms": t - 3.0, "prompt_tokens": 5, "output_tokens": 6}
        for t in (9.0, 11.0, 40.0)
    ]
    row = lone_row("headrace", "poisson", done)
    assert (row["ttft_ms"], row["tpot_ms"], row["front_ms"], row["requests"]) == (11.0, 2.0, 3.0, 3)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    made = FakeServer(tick_s=0.004)
    yield made
    made.close()


def test_closed_loops_of_every_width_in_turn(server: FakeServer) -> None:
    sweep = Sweep(Model(100, 64), replace(PACE, widths=(1, 3), width_s=0.6), 0, [])
    system = HTTPSystem("headrace", server.url, "m", Still())
    load = drawn_load(64, seed=0)
    for _ in range(3):
        sweep.level(system, load)
    assert [level.concurrency for level in sweep.levels] == [1, 3, 1]
    rows = [r for r in sweep.rows if r["kind"] == "level"]
    assert {(r["turn"], r["concurrency"]) for r in rows} == {(1, 1), (2, 3), (3, 1)}
    assert len(rows) == sum(len(level.rows) for level in sweep.levels)
    assert [bool(level.gaps_ms) for level in sweep.levels] == [True, False, True]
    prompts = [shot.prompt for level in sweep.levels for shot in level.shots if len(shot.prompt) > 8]
    assert len(set(prompts)) == len(prompts), "no cache may help"


def test_lone_and_saturation_on_a_server(server: FakeServer) -> None:
    sweep = Sweep(Model(100, 64), PACE, 0, [])
    system = HTTPSystem("headrace", server.url, "m", Still())
    load = drawn_load(64, seed=0)
    lone = sweep.lone(system, load)
    assert 3.0 < lone.tpot_ms < 60.0
    rate = sweep.saturation(system, load)
    row = sweep.rows[-1]
    assert (row["kind"], row["concurrency"]) == ("saturation", 4)
    assert row["requests_per_s"] == pytest.approx(rate, abs=1e-3)
    assert rate > 0
    dead = HTTPSystem("headrace", "http://127.0.0.1:9/v1", "m", Still())
    with pytest.raises(LostSystem, match="answered no request: ConnectionRefused"):
        sweep.lone(dead, load)


def test_a_peer_without_a_server_is_fed_in_its_process() -> None:
    class Session(Still):
        def replay(self, requests: Sequence[dict[str, Any]], timeout_s: float) -> list[dict[str, Any]]:
            assert requests[0]["prompt"] == [1, 2]
            return [
                {"id": "0", "at_s": 0.0, "first_s": 0.5, "end_s": 1.5, "tokens": 3},
                {"id": "1", "at_s": 0.1, "end_s": 9.0, "tokens": 3},
            ]

    from headrace.bench.workloads.arrivals import Arrival

    shots = [Shot(str(i), 0.1 * i, (1, 2), 3, Arrival(0.1 * i, 2, 3)) for i in range(3)]
    good, late, missing = SessionSystem("cb", Session()).replay(shots, cutoff_s=3.0).rows
    assert (good["finished"], good["ttft_ms"], good["tpot_ms"]) == (True, 500.0, 500.0)
    assert (late["finished"], missing["finished"]) == (False, False), "after the cut-off is too late"
