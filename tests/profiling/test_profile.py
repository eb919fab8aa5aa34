"""Online correction, measurement rounds and steps of a wanted shape."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.core.batch import StepShape, step_shape
from headrace.core.errors import InvalidRequest
from headrace.profiling import MeasuredProfile, Point, measure
from headrace.profiling.measure import timings, timings_within
from headrace.profiling.profile import Correction
from headrace.profiling.shapes import EvenStep, doubling, grid, held_out, spread_out


def decode(rows: int) -> StepShape:
    return StepShape(0, rows, 100 * rows, rows, 101 * rows)


def profile() -> MeasuredProfile:
    return MeasuredProfile([Point(decode(n), (10.0 + n,)) for n in (1, 2, 4, 8, 16, 32, 64)])


def test_a_lasting_change_is_learnt_within_fifty_steps() -> None:
    measured = profile()
    for _ in range(50):
        measured.observe(decode(8), 36.0)
    assert measured.cost(decode(8)) == pytest.approx(36.0, rel=0.05)


def test_a_hiccup_hardly_counts() -> None:
    measured = profile()
    measured.observe(decode(8), 18_000.0)
    assert measured.cost(decode(8)) == pytest.approx(18.0, rel=0.06)
    for broken in (0.0, -1.0, float("nan"), float("inf")):
        before = measured.cost(decode(8))
        measured.observe(decode(8), broken)
        assert measured.cost(decode(8)) == before


def test_noise_around_the_truth_does_not_drift() -> None:
    measured = profile()
    noise = np.random.default_rng(3)
    for _ in range(400):
        measured.observe(decode(8), 18.0 * float(noise.lognormal(0, 0.2)))
    assert measured.cost(decode(8)) == pytest.approx(18.0, rel=0.2)


def test_sizes_learn_apart_and_what_lies_between_is_continuous() -> None:
    correction = Correction()
    for _ in range(100):
        correction.observe(decode(1), correction.factor(decode(1)), 2.0)
        correction.observe(decode(64), correction.factor(decode(64)), 1.0)
    assert correction.factor(decode(1)) == pytest.approx(2.0, rel=0.01)
    assert correction.factor(decode(64)) == pytest.approx(1.0, rel=0.01)
    assert correction.factor(decode(1000)) == correction.factor(decode(64))
    between = [correction.factor(decode(rows)) for rows in range(1, 65)]
    assert between == sorted(between, reverse=True)
    assert max(a / b for a, b in itertools.pairwise(between)) < 1.13
    assert list(correction.factors) == ["decode:0", "decode:6"]


def test_prompts_and_decodes_learn_apart_once_both_were_seen() -> None:
    correction = Correction()
    prompt = StepShape(64, 0, 0, 1, 64 * 64)
    for _ in range(100):
        correction.observe(decode(64), correction.factor(decode(64)), 2.0)
    assert correction.factor(prompt) == correction.factor(decode(64)), "nothing better is known"
    for _ in range(100):
        correction.observe(prompt, correction.factor(prompt), 0.5)
    assert correction.factor(prompt) == pytest.approx(0.5, rel=0.01)
    assert correction.factor(decode(64)) == pytest.approx(2.0, rel=0.01)


def test_a_restored_correction_is_the_same_and_goes_on() -> None:
    first, second = Correction(), Correction()
    for rows, ratio in ((1, 1.5), (8, 0.7), (64, 1.1)):
        for _ in range(30):
            first.observe(decode(rows), 1.0, ratio)
    second.restore(first.factors)
    assert second.factors == pytest.approx(first.factors)
    assert second.factor(decode(20)) == pytest.approx(first.factor(decode(20)))
    for bad in ({"decode:x": 1.0}, {"draft:1": 1.0}, {"decode:99": 1.0}, {"decode:1": 0.0}, {"decode:1": float("nan")}):
        with pytest.raises(ValueError, match=r"bucket|factor"):
            Correction().restore(bad)


def test_factors_stay_within_bounds() -> None:
    correction = Correction(most=4.0)
    for _ in range(1000):
        correction.observe(decode(1), 1.0, 1e9)
    assert correction.factor(decode(1)) == pytest.approx(4.0)
    correction.restore({"decode:0": 1e-9})
    assert correction.factor(decode(1)) == pytest.approx(0.25)


def test_before_any_observation_nothing_is_corrected() -> None:
    measured = profile()
    assert measured.cost(decode(8)) == measured.base.cost(decode(8))
    assert measured.errors([Point(decode(8), (9.0, 18.0, 99.0))]) == [pytest.approx(0.0, abs=1e-6)]


def test_rounds_measure_every_step_and_forget_the_first() -> None:
    calls: list[StepShape] = []
    progress: list[tuple[int, int]] = []

    def run(shape: StepShape) -> float:
        calls.append(shape)
        cold = 1000.0 if calls.count(shape) == 1 else 0.0
        return cold + shape.decode_tokens

    shapes = [decode(n) for n in (1, 2, 4)]
    points = timings(run, shapes, repeats=3, report=lambda done, total: progress.append((done, total)))
    assert [p.shape for p in points] == shapes
    assert [p.ms for p in points] == [(1.0,) * 3, (2.0,) * 3, (4.0,) * 3]
    assert progress[-1] == (12, 12)
    assert measure(run, shapes).cost(decode(4)) == pytest.approx(4.0, rel=0.01)


def test_out_of_time_one_counted_round_remains() -> None:
    points = timings(lambda shape: 1.0, [decode(1), decode(2)], repeats=9, max_seconds=0.0)
    assert [len(p.ms) for p in points] == [1, 1]


def test_nothing_to_measure_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="at least one step"):
        timings(lambda shape: 1.0, list[StepShape]())


even_steps = st.builds(
    EvenStep,
    prompts=st.integers(0, 4),
    chunk=st.integers(2, 40),
    prompt_context=st.integers(0, 50),
    decodes=st.integers(0, 6),
    decode_context=st.integers(0, 50),
)


@given(even_steps)
def test_segments_have_the_shape_they_were_made_for(step: EvenStep) -> None:
    segments = step.segments(vocab_size=50, seed=1)
    assert step_shape(segments) == step.shape
    slots = np.concatenate([np.empty(0, np.int32), *(np.r_[s.context_slots, s.write_slots] for s in segments)])
    assert sorted(slots.tolist()) == list(range(step.slots))
    for segment in segments:
        held = len(segment.context_slots)
        assert segment.positions.tolist() == list(range(held, held + len(segment.tokens)))
        assert segment.tokens.max() < 50
        assert segment.wanted.tolist() == [len(segment.tokens) - 1]


@given(
    max_sequences=st.integers(1, 64), rows=st.integers(2, 600), context=st.integers(8, 5000), slots=st.integers(8, 9000)
)
def test_grids_fit_the_engine(max_sequences: int, rows: int, context: int, slots: int) -> None:
    bounds = {"max_sequences": max_sequences, "max_step_tokens": rows, "context": context, "slots": slots}
    steps = grid(**bounds)
    assert len(set(steps)) == len(steps)
    for step in [*steps, *held_out(**bounds, count=5)]:
        assert 0 < step.shape.prefill_tokens + step.shape.decode_tokens <= rows
        assert step.decodes <= max_sequences
        assert step.slots <= slots
        assert max(step.prompt_context + step.chunk, step.decode_context + 1) <= context
    assert not {s.shape for s in steps} & {s.shape for s in held_out(**bounds, count=5)}


def test_doubling() -> None:
    assert doubling(1, 6) == [1, 2, 4, 6]
    assert doubling(4, 4) == [4]
    assert doubling(4, 2) == []


def test_a_spread_out_grid_covers_all_sizes_from_the_start() -> None:
    steps = grid(max_sequences=32, max_step_tokens=512, context=2048, slots=100_000)
    order = spread_out(steps)
    assert sorted(map(repr, order)) == sorted(map(repr, steps))
    assert order == spread_out(steps)
    first = [s.shape for s in order[:15]]
    assert order[0].shape.sequences == 1
    assert {s.prefill_tokens > 0 for s in first} == {True, False}
    assert {1, 2, 4, 8, 16} <= {s.decode_tokens for s in first}
    assert max(s.prefill_tokens for s in first) < 64, "a large prompt costs as much as twenty small steps"
    assert max(s.decode_tokens for s in [o.shape for o in order[:27]]) == 32
    assert max(s.shape.prefill_tokens for s in order) >= 480


def test_a_small_share_of_the_grid_predicts_the_rest() -> None:
    """On a machine of known costs, what a sixth of the whole time pays for is enough."""

    def truth(shape: StepShape) -> float:
        rows = shape.prefill_tokens + shape.decode_tokens
        return 1.0 + 0.08 * rows + 0.05 * shape.decode_tokens + 3e-4 * shape.context + 2e-5 * shape.attended

    bounds = {"max_sequences": 32, "max_step_tokens": 512, "context": 2048, "slots": 100_000}
    steps = spread_out(grid(**bounds))
    left = sum(truth(s.shape) for s in steps) / 6
    few: list[Point] = []
    for step in steps:
        left -= truth(step.shape)
        if left < 0:
            break
        few.append(Point(step.shape, (truth(step.shape),)))
    assert len(few) > 20
    errors = sorted(
        MeasuredProfile(few).errors(Point(s.shape, (truth(s.shape),)) for s in held_out(**bounds, count=40))
    )
    assert errors[20] < 0.05
    assert errors[36] < 0.25
    assert spread_out([]) == []


def test_measuring_within_a_bound_keeps_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def run(shape: StepShape) -> float:
        now[0] += shape.decode_tokens * 1e-3
        return float(shape.decode_tokens)

    for bound in (0.0, 0.05, 0.3, 10.0):
        now[0] = 0.0
        points = timings_within(run, [decode(n) for n in (1, 2, 4, 64, 8)], bound, repeats=3)
        assert now[0] <= bound + 0.008 + 0.064, "two steps are measured whatever the bound"
        assert len(points) >= 2
    assert [len(p.ms) for p in points] == [3] * 5
