"""Claims of the quality half follow from rows by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from headrace.bench.pqcache.quality_claims import quality_claims
from headrace.bench.pqcache.quality_plots import write_quality_plot


def _recorded(model: str, method: str, mass: float, budget: float = 0.1, layer: int = 0) -> dict[str, Any]:
    return {"part": "quality", "kind": "recorded", "model": model, "method": method, "budget": budget, "layer": layer,
            "mass": mass, "error": 1.0 - mass}  # fmt: skip


def _task(family: str, method: str, budget: float, right: int) -> dict[str, Any]:
    return {"part": "quality", "kind": "task", "model": "m", "family": family, "length": 64, "method": method,
            "budget": budget, "items": 10, "right": right}  # fmt: skip


def _forced(method: str, budget: float, gap: float) -> dict[str, Any]:
    return {
        "part": "quality",
        "kind": "forced",
        "method": method,
        "budget": budget,
        "gap": gap,
        "divergence": 2.0 * abs(gap),
    }


def _drift(rule: float | None, kept: float, layer: int) -> dict[str, Any]:
    return {
        "part": "quality",
        "kind": "drift",
        "refresh": rule,
        "model": "m",
        "codes": "4x8",
        "layer": layer,
        "mass": kept,
        "mass_fresh": 0.9,
    }


ROWS = [
    _recorded("a", "pq 4x8", 0.9), _recorded("a", "pq 4x8", 0.7, layer=1), _recorded("b", "pq 4x8", 0.6),
    _recorded("b", "pq 4x8", 0.1, budget=0.05), _recorded("a", "quest", 0.5),
    _task("needle", "dense", 1.0, 10), _task("needle", "pq 4x8, residual", 0.1, 9), _task("needle", "snapkv", 0.1, 9),
    _task("moved", "dense", 1.0, 9), _task("moved", "pq 4x8, residual", 0.1, 9), _task("moved", "snapkv", 0.1, 2),
    _task("needle", "pq 4x8, residual", 0.2, 10),
    _forced("pq 4x8, residual", 0.2, 0.004), _forced("pq 4x8, residual", 0.2, -0.002), _forced("pq 4x8, residual", 0.1, 0.02),
    _drift(0.25, 0.89, 0), _drift(0.25, 0.88, 1), _drift(None, 0.4, 1),
    {"part": "speed", "kind": "task", "method": "pq 4x8"},
]  # fmt: skip


def test_claims_of_rows() -> None:
    found = quality_claims(ROWS)
    assert found["mass_kept_4x8"] == pytest.approx(0.7)  # (0.8 + 0.6) / 2
    assert found["mass_kept_quest_same_tokens"] == 0.5
    assert found["dense_acc"] == 0.9
    assert found["acc_r10_minus_dense_items"] == -1
    assert found["acc_r5_minus_dense_items"] == 0
    assert found["acc_moved_pq_minus_dense_items"] == 0
    assert found["acc_moved_snapkv_minus_dense_items"] == -7
    assert found["acc_r10_minus_best_dropping_items"] == 0  # no lead on needles
    assert found["nll_gap_r5"] == pytest.approx(0.001)
    assert found["nll_gap_r10"] == pytest.approx(0.02)
    assert found["divergence_r5"] == pytest.approx(0.006)
    assert found["long_decode_drift_gap_refresh"] == pytest.approx(1.5)
    assert found["long_decode_drift_gap_norefresh"] == pytest.approx(50.0)


def test_claims_without_rows_are_left_out() -> None:
    assert quality_claims([]) == {}
    assert "nll_gap_r5" not in quality_claims([row for row in ROWS if row["kind"] != "forced"])


def test_the_plot_is_written(tmp_path: Path) -> None:
    write_quality_plot(tmp_path / "quality.png", ROWS)
    assert (tmp_path / "quality.png").read_bytes()[:4] == b"\x89PNG"
