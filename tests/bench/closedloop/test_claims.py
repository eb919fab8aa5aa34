"""Claims of the closed loop, computed from rows written by hand."""

from __future__ import annotations

from typing import Any

import pytest

from headrace.bench.closedloop.claims import claims, same_tokens, table


def turns(
    engine: str, precision: str, batch: int, rates: list[float], prefill: float = 100.0, **more: Any
) -> list[dict[str, Any]]:
    probe = {"probe_before_gb_s": 20.0, "probe_after_gb_s": 20.0}
    return [
        {"kind": "decode", "engine": engine, "precision": precision, "batch": batch, "repeat": i, "decode_tok_s": rate,
         "prefill_tok_s": prefill, **probe, **more}
        for i, rate in enumerate(rates)
    ]  # fmt: skip


def test_ratios_are_of_medians_and_against_the_best_peer_of_the_same_precision() -> None:
    rows = [
        *turns("headrace", "fp32", 1, [50.0, 1.0, 60.0]),
        *turns("headrace", "fp32", 8, [300.0], prefill=1000.0),
        *turns("headrace", "int8", 8, [700.0], prefill=3000.0),
        *turns("transformers", "fp32", 1, [20.0, 25.0, 30.0]),
        *turns("transformers-cb", "fp32", 8, [100.0]),
        *turns("openvino", "fp32", 1, [40.0]),
        *turns("openvino", "fp32", 8, [200.0], prefill=800.0),
        *turns("openvino", "int8", 8, [350.0], prefill=4000.0),
        *turns("llama.cpp", "int4", 8, [9999.0], prefill=9999.0),
    ]
    assert claims(rows) == {
        "tok_s_vs_hf_generate_b1": 2.0,
        "tok_s_vs_hf_cb_b8": 3.0,
        "tok_s_vs_best_peer_b1_fp32": 1.25,
        "tok_s_vs_best_peer_b8_fp32": 1.5,
        "tok_s_vs_best_peer_b8_int8": 2.0,
        "prefill_tok_s_vs_best_peer_fp32": 1.25,
        "prefill_tok_s_vs_best_peer_int8": 0.75,
        "prefill_tok_s_vs_best_peer": 0.75,
    }


def test_disturbed_turns_are_left_out_of_everybodys_medians() -> None:
    rows = turns("a", "fp32", 1, [10.0, 30.0, 20.0]) + turns("b", "fp32", 1, [5.0, 5.0, 5.0])
    assert table(rows)[0].decode == 20.0
    rows[0]["probe_after_gb_s"] = 9.0
    line = table(rows)[0]
    assert (line.decode, line.low, line.high, line.turns) == (25.0, 20.0, 30.0, 2)
    rows[1]["probe_before_gb_s"] = 9.0
    assert table(rows)[0].turns == 3, (
        "most of its turns were disturbed: a median of the rest would be a choice, not a rule"
    )


def test_tokens_are_compared_place_by_place_with_the_reference_in_float32() -> None:
    def said(engine: str, precision: str, tokens: list[list[int]]) -> dict[str, Any]:
        return {"kind": "agreement", "engine": engine, "precision": precision, "tokens": tokens}

    reference = said("transformers", "fp32", [[1, 2, 3, 4], [5, 6, 7, 8]])
    rows = [reference, said("headrace", "fp32", [[1, 2, 3, 4], [5, 6, 0, 8]]), said("headrace", "int8", [[0] * 4] * 2)]
    assert claims(rows) == {"identical_tokens_rate": 0.875}
    assert claims([reference]) == {}
    assert same_tokens([[1, 2]], [[1, 2, 3]]) == pytest.approx(2 / 3)


def test_trees_shares_kv_and_drafts() -> None:
    rows: list[dict[str, Any]] = [
        {"kind": "tree", "rows": 1, "ms": [10.0, 30.0, 20.0]},
        {"kind": "tree", "rows": 8, "ms": [24.0]},
        {"kind": "overhead", "batch": 1, "outside_forward_share": 0.01},
        {"kind": "overhead", "batch": 8, "outside_forward_share": 0.03},
        {"kind": "kv", "source": "a", "tokens": 100, "nll": 2.0, "nll_int8": 2.03},
        {"kind": "kv", "source": "b", "tokens": 300, "nll": 3.0, "nll_int8": 2.99},
        {"kind": "drafts", "source": "a", "along": "text", "runs": [1, 0, 0, 0, 1]},
        {"kind": "drafts", "source": "b", "along": "text", "runs": [0, 0, 0, 0, 5]},
        {"kind": "drafts", "source": "a", "along": "continuation", "runs": [1, 1, 0, 0, 0]},
        {"kind": "sweep", "anything": "of another measurement"},
        {"kind": "lost", "engine": "vllm", "why": "not installed"},
    ]
    assert claims(rows) == {
        "tree8_cost_ratio": 1.2,
        "engine_overhead_share": 0.03,
        "kv_int8_nll_gap": 0.0,
        "draft_accepted_of_4": 3.0,
        "draft_accepted_of_4_continuation": 0.5,
    }


def test_no_rows_make_no_claims() -> None:
    assert claims([]) == {}
    assert table([]) == []
