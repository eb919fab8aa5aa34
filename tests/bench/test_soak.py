"""Verdicts of a soak: each kind of leak and drift is found where it was put, and none where there is none."""

from __future__ import annotations

import random
from typing import Any

import pytest

from headrace.bench import soak
from headrace.bench.soak import Soak
from headrace.core.errors import InvalidRequest

NONE = dict.fromkeys(("leak_memory", "leak_files", "leak_slots", "drift_profile", "drift_latency"), 0.0)


def samples(**of_time: Any) -> list[dict[str, Any]]:
    """Twenty minutes of samples; a keyword's function of the share of time that has passed replaces a field."""
    noise = random.Random(0)
    rows: list[dict[str, Any]] = []
    for number in range(600):
        share = number / 599
        base = {
            "server_rss_mib": 300 + 60 * min(1.0, share * 5) + noise.random(),
            "engine_rss_mib": 900 + 30 * noise.random(),
            "server_fds": 20 + int(30 * share) + noise.randrange(30),
            "profile_error_p50": 0.06 + 0.02 * noise.random(),
            "profile_measured_seconds": 1.5 * number,
            "profile_predicted_seconds": 1.6 * number,
        }
        rows.append({"kind": "sample", "at_s": number * 2.0, **base, **{n: f(share) for n, f in of_time.items()}})
    return rows


def rounds(**of_time: Any) -> list[dict[str, Any]]:
    base = {"requests": 100, "finished": 100, "tpot_ms_p50": 2.0, "rest_slots_used": 0.0, "rest_running_sequences": 0.0,
            "rest_server_fds": 11, "rest_engine_fds": 8, "rest_server_threads": 8, "rest_engine_threads": 6}  # fmt: skip
    return [
        {"kind": "round", "number": n, "at_s": 30.0 * n, **base, **{name: f(n / 39) for name, f in of_time.items()}}
        for n in range(40)
    ]


def test_growth_while_caches_fill_is_no_leak() -> None:
    assert soak.verdict([*samples(), *rounds()]) == NONE


def test_files_are_judged_by_what_was_least_open_where_rest_was_not_looked_at() -> None:
    def bare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{k: v for k, v in row.items() if not k.startswith("rest_server_fds")} for row in rows]

    assert soak.verdict([*samples(server_fds=lambda t: 11 + int(20 * t) % 7), *bare(rounds())])["leak_files"] == 0.0
    assert soak.verdict([*samples(server_fds=lambda t: 11 + int(20 * t)), *bare(rounds())])["leak_files"] == 1.0


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("leak_memory", [*samples(engine_rss_mib=lambda t: 900 + 40 * t), *rounds()]),
        ("leak_memory", [*samples(server_rss_mib=lambda t: 300 + 25 * t), *rounds()]),
        ("leak_files", [*samples(), *rounds(rest_server_fds=lambda t: 11 + int(10 * t))]),
        ("leak_files", [*samples(), *rounds(rest_engine_threads=lambda t: 6 + int(8 * t))]),
        ("leak_slots", [*samples(), *rounds(rest_slots_used=lambda t: 64.0 if t == 1 else 0.0)]),
        ("leak_slots", [*samples(), *rounds(rest_running_sequences=lambda t: float(t > 0.5))]),
        ("drift_profile", [*samples(profile_error_p50=lambda t: 0.06 + 0.2 * t), *rounds()]),
        ("drift_profile", [*samples(profile_predicted_seconds=lambda t: 900 * (t - 0.3 * t * t)), *rounds()]),
        ("drift_latency", [*samples(), *rounds(tpot_ms_p50=lambda t: 2.0 + 3.0 * t)]),
    ],
)
def test_what_leaks_or_drifts_is_found_and_nothing_else(name: str, rows: list[dict[str, Any]]) -> None:
    assert soak.verdict(rows) == {**NONE, name: 1.0}


def test_claims_state_what_the_verdict_rests_on() -> None:
    found = soak.claims([*samples(engine_rss_mib=lambda t: 900 + 20 * t), *rounds(finished=lambda t: 99)])
    assert found["engine_rss_mib_per_hour"] == pytest.approx(60.0, rel=0.01), "20 MiB in 20 minutes"
    assert (found["requests"], found["requests_lost"]) == (4000, 40)
    assert found["minutes"] == pytest.approx(19.97, abs=0.01)
    assert soak.claims([]) == {}


def test_slopes_are_not_moved_by_outliers() -> None:
    rows = [{"at_s": 10.0 * i, "x": 5.0 + i + (1000.0 if i % 10 == 0 else 0.0)} for i in range(100)]
    assert soak.slope_per_hour(rows, "x") == pytest.approx(360.0, rel=0.02)
    assert soak.slope_per_hour([], "x") == 0.0


def test_rounds_keep_latencies_losses_and_what_is_held() -> None:
    request = {"arrival_s": 0.0, "end_s": 1.0, "decoded": 4, "finished": True, "ttft_ms": 10.0, "tpot_ms": 2.0, "e2e_ms": 16.0,
               "slo_ttft_ms": None, "slo_tpot_ms": None, "prompt_tokens": 4, "cached_tokens": 0, "preemptions": 0}  # fmt: skip
    lost = {**request, "finished": False, "ttft_ms": None, "tpot_ms": None, "error": "HTTP 500: no"}
    row = soak.round_row(3, 60.0, [request, lost], {"late": 1}, {"rest_slots_used": 5.0})
    assert (row["requests"], row["finished"], row["tpot_ms_p50"], row["errors"], row["rest_slots_used"]) == (
        2, 1, 2.0, ["HTTP 500: no"], 5.0,
    )  # fmt: skip


def test_impossible_soaks_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="minutes is 0"):
        Soak(minutes=0)


def test_plots_have_a_curve_for_each_process() -> None:
    drawn = soak.panels([*samples(), *rounds()])
    assert {name: len(points) for name, points in drawn["memory, MiB"].items()} == {"server": 600, "engine": 600}
    assert len(drawn["TPOT, ms"]["p50"]) == 40
