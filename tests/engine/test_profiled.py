"""An engine with its profile: measured or found at the start, corrected by steps, shown to policies, kept at the end."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from tests import tiny

from headrace.compose import engine_around
from headrace.core.batch import StepShape
from headrace.core.config import EngineConfig
from headrace.core.policy import Limits, StepPlan, View
from headrace.core.request import Request, SamplingParams
from headrace.engine import profiled
from headrace.engine.engine import Engine
from headrace.engine.policies.chunked import Chunked
from headrace.profiling import store
from headrace.profiling.shapes import EvenStep

LIMITS = Limits(max_sequences=4, max_step_tokens=32)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(profiled, "START_SECONDS", 0.3)
    return tmp_path / "cache" / "profiles"


def build(**options: object) -> Engine:
    config = EngineConfig(
        **(
            {
                "profile": "auto",
                "draft": "off",
                "linears": "module",
                "attention": "reference",
                "kv_gib": 0.005,
                "limits": LIMITS,
            }
            | options
        )  # type: ignore[arg-type]
    )
    return engine_around(tiny.loaded("llama"), config)


def serve(engine: Engine, tokens: int = 40) -> None:
    for number in range(3):
        engine.add(Request(str(number), (5, 6, 7 + number), SamplingParams(max_tokens=tokens, ignore_eos=True)))
    while engine.busy:
        engine.step()


def test_a_start_measures_and_the_next_one_reads(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build()
    assert first.profile is not None
    (kept,) = cache.iterdir()
    assert json.loads(kept.read_text())["correction"] == {}
    stats = first.stats()
    assert (stats.steps, stats.finished, stats.aborted, stats.slots_free) == (0, 0, 0, stats.slots_total)

    monkeypatch.setattr(profiled, "measure_quickly", lambda *_: pytest.fail("there is a stored one"))
    again = build().profile
    shape = StepShape(0, 3, 90, 3, 93)
    assert again is not None
    assert again.cost(shape) == pytest.approx(first.profile.cost(shape))


def test_steps_teach_and_closing_keeps_it(cache: Path) -> None:
    engine = build()
    serve(engine, tokens=100)
    stats = engine.stats()
    assert stats.predicted_steps == stats.steps == sum(stats.step_seconds.counts) == sum(stats.forward_seconds.counts)
    assert stats.profile_error_p50 is not None
    engine.close()
    (kept,) = cache.iterdir()
    assert set(json.loads(kept.read_text())["correction"]) >= {"decode:2"}
    assert build().profile.correction.factors == engine.profile.correction.factors  # type: ignore[union-attr]


def test_policies_see_it() -> None:
    seen: list[float] = []

    class Curious(Chunked):
        def plan(self, view: View) -> StepPlan:
            assert view.profile is not None
            seen.append(view.profile.cost(StepShape(0, 1, 10, 1, 11)))
            return super().plan(view)

    engine = build()
    engine.policy = Curious()
    serve(engine, tokens=3)
    assert all(ms > 0 for ms in seen)
    assert len(seen) >= 3


def test_off_is_off(cache: Path) -> None:
    engine = build(profile="off")
    assert engine.profile is engine.observer is None
    serve(engine, tokens=3)
    assert engine.stats().profile_error_p50 is None
    assert not cache.exists()


def test_measure_measures_anew(cache: Path) -> None:
    build()
    (kept,) = cache.iterdir()
    before = kept.read_bytes()
    build(profile="measure")
    assert kept.read_bytes() != before


@pytest.mark.parametrize("damage", [b"{", b"", b"[" * 100_000, b'{"format": 1}', b"\xff\xfe"])
def test_a_file_of_ones_own_is_made_and_a_damaged_one_measured_again(
    damage: bytes, tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = tmp_path / "mine.json"
    build(profile=str(own))
    assert store.read(own).points
    assert not cache.exists()
    own.write_bytes(damage)
    with caplog.at_level(logging.WARNING):
        assert build(profile=str(own)).profile is not None
    assert "measuring again" in caplog.text
    assert store.read(own).points


def test_a_profile_of_something_else_is_not_believed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    own = tmp_path / "mine.json"
    build(profile=str(own))
    data = json.loads(own.read_text())
    data["key"]["device"] = "another machine"
    own.write_text(json.dumps(data))
    with caplog.at_level(logging.WARNING):
        build(profile=str(own))
    assert "measured for something else" in caplog.text


def test_a_cache_that_cannot_be_written_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        engine = build(profile=str(tmp_path / "no" / "such" / "folder" / "p.json"))
        serve(engine, tokens=100)
        engine.close()
    assert engine.profile is not None
    assert caplog.text.count("could not be written") == 2


def test_a_context_of_a_few_tokens_needs_no_profile() -> None:
    assert build(max_context=4).profile is None


@pytest.mark.parametrize(
    "step",
    [
        EvenStep(decodes=3, decode_context=20),
        EvenStep(prompts=1, chunk=9),
        EvenStep(prompts=2, chunk=5, prompt_context=30, decodes=2, decode_context=7),
    ],
)
def test_a_timed_step_has_the_shape_it_should(step: EvenStep) -> None:
    engine = build(profile="off")
    shapes: list[StepShape] = []
    run = engine.runner.run

    def record(batch: object) -> object:
        shapes.append(batch.shape)  # type: ignore[attr-defined]
        return run(batch)  # type: ignore[arg-type]

    engine.runner.run = record  # type: ignore[assignment, method-assign]
    timer = profiled.StepTimer(engine)
    for _ in range(3):
        assert timer(step) > 0
        assert shapes[-1] == step.shape
    assert engine.space.pool.free == engine.space.pool.size, "slots are back"
