"""The real part's workload, on paper and on the bundled pair."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headrace.bench.adaserve.load import PAPER_BASELINE_MS, read, scaled_slo
from headrace.bench.workloads.arrivals import Arrival
from headrace.core.errors import InvalidRequest
from headrace.core.request import SLO


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    kinds: list[dict[str, object]] = [{"slo_ratio": 1.2}, {"slo_ratio": -50}, {"slo": {"tpot_ms": 90}}, {}]
    lines = [
        {"emission_time_ms": 100.0 * i, "prompt": "The mill stands where the river falls. " * 9, "output_length": 256}
        | kinds[i % 4]
        for i in range(24)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_targets_scale_with_the_machine() -> None:
    def target(slo: SLO, category: str) -> SLO:
        return scaled_slo(Arrival(0.0, 1, 1, slo=slo, category=category), 60.0)

    assert target(SLO(tpot_ms=1.2), "1.2").tpot_ms == pytest.approx(72.0)
    assert target(SLO(tpot_ms=50.0), "-50").tpot_ms == pytest.approx(50.0 * 60.0 / PAPER_BASELINE_MS)
    assert target(SLO(ttft_ms=900.0), "").ttft_ms == pytest.approx(1800.0)


def test_prompts_are_cut_to_the_context_and_every_class_has_a_target(trace: Path) -> None:
    texts = read(trace, lambda text: list(range(len(text))), context=64, answer=16, vocab_size=1000)
    assert {len(prompt) for prompt in texts.prompts} == {48}
    requests = texts.piece(5.0, 8, 20.0, seed=3, name="x", start=100.0)
    assert len({request.id for request in requests}) == 8
    assert [r.arrival for r in requests] == sorted(r.arrival for r in requests)
    assert requests[0].arrival == 100.0
    assert requests[-1].arrival == pytest.approx(100.0 + 7 / 5.0)
    assert all(r.params.max_tokens == 16 for r in requests)
    wanted = {round(r.slo.tpot_ms or 0.0, 3) for r in requests}
    assert wanted == {24.0, round(50 * 20 / 30, 3), 60.0}
    again = texts.piece(5.0, 8, 20.0, seed=3, name="y", start=0.0)
    assert [r.prompt for r in again] == [r.prompt for r in requests]


def test_a_bad_trace_is_named_before_a_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="cannot be read"):
        read(tmp_path / "none.jsonl", lambda text: [0], context=64, answer=16, vocab_size=10)


@pytest.mark.slow
def test_the_bundled_pair_is_served_and_answers_are_identical(trace: Path) -> None:
    """Everything of the real part on the bundled target itself: runs of two policies, and the identity of answers."""
    from headrace.bench.adaserve.identity import identity_rows
    from headrace.bench.adaserve.pair import Target, build
    from headrace.bench.adaserve.real import Setting, sweep
    from headrace.bench.adaserve.realclaims import real_claims
    from headrace.models.text.tokenizer import Tokenizer

    rows = list(identity_rows(trace, ("chunked", "spec-4", "adaserve"), 6, lambda line: None))
    assert {row["policy"] for row in rows} == {"spec-4", "adaserve"}
    assert all(row["prompts"] == 6 and row["accepted"] > 0 for row in rows)
    bench = build(Target(quantize=None, context=96, threads=1), "bundled")
    try:
        card = bench.engine.card
        texts = read(trace, Tokenizer(Path(card.path)).encode, context=96, answer=8, vocab_size=card.vocab_size)
        setting = Setting(policies=("adaserve", "chunked"), loads=(0.5,), seconds=0.5, drain_s=20.0, turns=1)
        rows += list(sweep(bench, texts, setting, 1e4, 12.0, lambda line, done, total: None))
    finally:
        bench.engine.close()
    claims = real_claims(rows)
    assert claims["lossless_identical_rate"] == 1.0
    assert claims["real_attainment_adaserve_0.5"] == claims["real_attainment_chunked_0.5"] == 100.0
