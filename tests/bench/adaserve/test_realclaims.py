"""What the rows of the real part come to."""

from __future__ import annotations

from typing import Any

import pytest

from headrace.bench.adaserve.drawing import curve_panels, real_panels
from headrace.bench.adaserve.real import POLICIES, rotated
from headrace.bench.adaserve.realclaims import goodput, real_claims


def run(policy: str, load: float, attained: int, requests: int = 20, **more: Any) -> dict[str, Any]:
    row = {
        "kind": "real", "policy": policy, "load": load, "turn": 0, "attained": attained, "requests": requests,
        "goodput_tok_s": 10.0 * attained, "duration_s": 10.0, "accepted": 30, "verifications": 20, "plan_s": 0.05,
        "draft_s": 0.2, "step_s": 10.0,
    }  # fmt: skip
    return row | more


def test_turns_add_up_request_by_request() -> None:
    found = real_claims([run("adaserve", 0.5, 10, 10), run("adaserve", 0.5, 10, 30)])
    assert found["real_attainment_adaserve_0.5"] == 50.0
    assert found["real_tokens_per_step"] == 2.5
    assert found["selection_time_share"] == 0.005


def test_goodput_is_weighted_by_time() -> None:
    runs = [run("adaserve", 0.5, 10, goodput_tok_s=100.0, duration_s=30.0), run("adaserve", 0.5, 10, goodput_tok_s=0.0)]
    assert goodput(runs) == pytest.approx(75.0)


def test_the_worst_load_makes_the_margin_and_the_highest_useful_one_the_gain() -> None:
    rows = [
        run("adaserve", 0.3, 20), run("spec-4", 0.3, 19), run("adaptive-chain", 0.3, 20),
        run("adaserve", 0.6, 14), run("spec-4", 0.6, 10), run("adaptive-chain", 0.6, 15),
        run("adaserve", 0.9, 5), run("spec-4", 0.9, 4), run("equal", 0.9, 11),
    ]  # fmt: skip
    found = real_claims(rows)
    assert found["real_never_below_margin_points"] == -5.0
    assert found["real_margin_points_0.9"] == 5.0
    assert found["real_highest_useful_load"] == 0.6
    assert found["real_goodput_ratio_best_fixed"] == 1.4
    assert found["real_attainment_gain_best_fixed_points"] == 20.0


def test_identity_counts_prompts_of_every_policy() -> None:
    rows = [
        {"kind": "identity", "policy": p, "prompts": 200, "identical": n, "ties": 1}
        for p, n in (("a", 200), ("b", 198))
    ]
    found = real_claims(rows)
    assert found["lossless_identical_rate"] == 0.995
    assert found["lossless_ties_rate"] == 0.005


def test_alone_compares_within_a_system() -> None:
    took = {"transformers": 40.0, "transformers assisted": 20.0, "headrace chunked": 18.0, "headrace adaserve": 6.0}
    rows = [{"kind": "assisted", "system": s, "prompt": 1, "tpot_ms": ms} for s, ms in took.items()]
    found = real_claims(rows)
    assert found["alone_speedup_by_drafts_transformers"] == 2.0
    assert found["alone_speedup_by_drafts_headrace"] == 3.0


def test_nothing_measured_claims_nothing() -> None:
    assert real_claims([]) == {}
    assert real_panels([]) == {}
    assert curve_panels([]) == {}


def test_policies_take_turns_at_being_first() -> None:
    firsts = [rotated(POLICIES, turn)[0] for turn in range(len(POLICIES))]
    assert sorted(firsts) == sorted(POLICIES)
    assert all(sorted(rotated(POLICIES, turn)) == sorted(POLICIES) for turn in range(3))
