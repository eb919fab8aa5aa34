"""Metrics against numpy and against counts made by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.bench import metrics
from headrace.bench.metrics import RequestRow


def row(**fields: object) -> RequestRow:
    made: dict[str, object] = {
        "id": "x", "category": "", "owner": "", "arrival_s": 0.0, "end_s": 1.0, "prompt_tokens": 10, "output_tokens": 5,
        "decoded": 5, "cached_tokens": 0, "preemptions": 0, "finished": True, "ttft_ms": 100.0, "tpot_ms": 20.0, "e2e_ms": 180.0,
        "slo_ttft_ms": None, "slo_tpot_ms": None,
    }  # fmt: skip
    return {**made, **fields}  # type: ignore[typeddict-item, return-value]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, True),
        ({"finished": False}, False),
        ({"slo_tpot_ms": 20.0}, True),
        ({"slo_tpot_ms": 19.9}, False),
        ({"slo_tpot_ms": 19.9, "tpot_ms": None, "decoded": 1}, True),
        ({"slo_ttft_ms": 100.0}, True),
        ({"slo_ttft_ms": 99.0}, False),
        ({"slo_ttft_ms": 99.0, "slo_tpot_ms": 50.0}, False),
        ({"slo_ttft_ms": 1e9, "slo_tpot_ms": 1e9, "finished": False}, False),
    ],
)
def test_attained(fields: dict[str, object], expected: bool) -> None:
    assert metrics.attained(row(**fields)) is expected


def test_rates_and_shares_by_hand() -> None:
    rows = [
        row(arrival_s=10.0, end_s=12.0, decoded=40),
        row(arrival_s=11.0, end_s=15.0, decoded=60, slo_tpot_ms=10.0),
        row(arrival_s=11.0, end_s=20.0, decoded=7, finished=False),
    ]
    assert metrics.attainment(rows) == pytest.approx(1 / 3)
    assert metrics.duration_s(rows) == 10.0
    assert metrics.goodput(rows) == 4.0
    assert metrics.throughput(rows) == pytest.approx(10.7)


def test_the_worst_window_is_by_arrival() -> None:
    late = {"slo_tpot_ms": 1.0}
    rows = [row(arrival_s=5.0), row(arrival_s=64.9), row(arrival_s=65.1), row(arrival_s=70.0, **late)]
    assert metrics.worst_window(rows, 60.0) == 0.5
    assert metrics.worst_window(rows, 1e6) == 0.75
    assert metrics.worst_window([], 60.0) == 1.0


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.floats(0, 100))
def test_percentiles_are_numpys(values: list[float], q: float) -> None:
    assert metrics.percentile(values, q) == pytest.approx(float(np.percentile(values, q)), rel=1e-9, abs=1e-6)


def test_nothing_has_no_percentile() -> None:
    assert math.isnan(metrics.percentile([], 50))


def test_summary_of_nothing_and_of_the_unfinished() -> None:
    assert metrics.summary([])["requests"] == 0
    found = metrics.summary([row(finished=False, ttft_ms=None, tpot_ms=None, e2e_ms=None, decoded=0)])
    assert found["attainment"] == 0.0
    assert math.isnan(found["ttft_ms_p50"])
    assert found["requests"] == 1
    assert found["finished"] == 0


def test_summary_counts_cached_prompts() -> None:
    assert metrics.summary([row(cached_tokens=5), row()])["cached_share"] == 0.25
