"""The measurements of the quality half, on tiny models: ends that are known, and controls that must fail."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from headrace.bench.pqcache.analytic import analytic_model
from headrace.bench.pqcache.drift import drift_rows
from headrace.bench.pqcache.forced import forced_rows
from headrace.bench.pqcache.methods import (
    BASELINES,
    DENSE,
    PQ_LARGE,
    PQ_RESIDUAL,
    PQ_SMALL,
    Method,
    Started,
    attend_by,
    greedy,
    read,
)
from headrace.bench.pqcache.recorded import recorded_rows
from headrace.bench.pqcache.taskrows import Exam, task_rows
from headrace.bench.pqcache.tasks import Shape, make, synthetic
from headrace.bench.pqcache.texts import answered, shifted

FULL = Method("full", "full")
SMALL = Method("pq 2x4", "pq", {"codes": "2x4"})


def _quiet(text: str) -> None:
    """Says nothing."""


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, eos_token_id=None, initializer_range=0.15,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def _ids(rows: int, length: int) -> torch.Tensor:
    return torch.randint(1, 128, (rows, length), generator=torch.Generator().manual_seed(1))


def test_recorded_attention_is_bounded_by_full_and_oracle(model: Any) -> None:
    methods = (FULL, SMALL, Method("residual", "pq", {"codes": "2x4", "residual": True}), *BASELINES)
    rows = recorded_rows("tiny", read(model, _ids(2, 400)), methods, (0.2,), _quiet)
    by = {(row["method"], row["layer"]): row for row in rows}
    for layer in range(2):
        full, oracle = by["full", layer], by["oracle", layer]
        assert full["mass"] == pytest.approx(1.0, abs=1e-5)
        assert full["error"] < 1e-5
        assert oracle["recall"] == 1.0
        for method in methods[1:]:
            row = by[method.name, layer]
            assert row["mass"] < full["mass"]
            if method.name != "pyramidkv":  # which takes more tokens in the first layer
                assert row["mass"] <= oracle["mass"] + 0.01
                assert row["attended"] == oracle["attended"]
        assert by["pq 2x4", layer]["mass"] > by["streaming", layer]["mass"]
        assert by["residual", layer]["error"] < by["pq 2x4", layer]["error"]
        assert by["residual", layer]["mass"] == by["pq 2x4", layer]["mass"]


def test_forced_likelihood_of_dense_is_the_models_own(model: Any) -> None:
    windows = _ids(2, 200)
    rows = forced_rows("tiny", model, windows, 180, (FULL, SMALL), (0.1,), _quiet)
    with torch.inference_mode():
        logits = model(windows, use_cache=False).logits[:, 180:-1]
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), windows[:, 181:], reduction="none").mean(1)
    for row in rows:
        assert row["nll_dense"] == pytest.approx(float(expected[row["window"]]), abs=1e-4)
        assert row["tokens"] == 19
        if row["method"] == "full":
            assert row["gap"] == pytest.approx(0.0, abs=1e-4)
            assert row["divergence"] == pytest.approx(0.0, abs=1e-4)
        else:
            assert row["divergence"] > 1e-3


def test_a_context_read_once_is_answered_as_if_read_anew() -> None:
    language = synthetic(512)
    model = analytic_model(language, 512)
    task = make("multikey", language, Shape(512), 3)
    context = read(model, torch.tensor([task.context]))
    for method in (DENSE, PQ_SMALL, Method("oracle", "oracle")):
        started = Started(method, model, context)
        attend_by(method, model)
        for question in task.questions:  # a continuation leaves nothing behind for the next
            assert tuple(greedy(model, started.cache(0.2), question.suffix, len(question.answer))) == question.answer


def test_tasks_count_what_a_method_lost() -> None:
    """Dense and PQ answer; a window of the newest tokens cannot, and its rows must say so."""
    language = synthetic(512)
    exam = Exam(("pairs", "moved"), Shape(1024, questions=3), contexts=1)
    methods = (PQ_LARGE, Method("streaming", "streaming"), Method("snapkv", "snapkv"))
    rows = task_rows("analytic", analytic_model(language, 512), language, [exam], methods, (0.1,), _quiet)
    right = {(row["method"], row["family"]): row["right"] for row in rows}
    assert {row["items"] for row in rows} == {3}
    for family in ("pairs", "moved"):
        assert right["dense", family] == right["pq 4x8", family] == 3
        assert right["streaming", family] < 3
    assert right["snapkv", "moved"] == 0


def test_drift_shows_without_refresh_and_goes_with_it() -> None:
    language = synthetic(512)
    ids = shifted(language, 700, 1400, seed=2)
    assert ids.shape == (1, 2100)
    prompt, answer = set(ids[0, :700].tolist()), set(ids[0, 700:].tolist())
    marks = {language.start, language.ask, language.define, language.stop}
    assert prompt & answer <= marks
    context = read(analytic_model(language, 512), ids)
    rows = drift_rows("analytic", context, 700, ("2x4",), (None, 0.1), 0.1, _quiet)
    kept = {row["refresh"]: row for row in rows if row["layer"] == 1}
    assert kept[None]["mass_fresh"] == kept[0.1]["mass_fresh"]
    assert kept[None]["mass_fresh"] - kept[None]["mass"] > kept[0.1]["mass_fresh"] - kept[0.1]["mass"]
    assert kept[0.1]["mass"] > kept[None]["mass"]


def test_contexts_with_answers_hold_them() -> None:
    language = synthetic(512)
    ids = answered(language, "multikey", 512, 2, seed=0, value=4, questions=3, spacing=32)
    assert ids.shape == (2, 512)
    assert not torch.equal(ids[0], ids[1])
    assert int((ids == language.ask).sum()) == 6


def test_the_residual_is_measured_by_the_same_choice() -> None:
    assert PQ_RESIDUAL.options["codes"] == PQ_LARGE.options["codes"]
