"""The cost fit: monotone, exact where the truth is in reach, equal to isotonic regression in one size."""

from __future__ import annotations

import itertools
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.core.batch import StepShape
from headrace.profiling.fit import Curve, choose_knots, fit
from headrace.profiling.profile import MeasuredProfile, Point
from headrace.profiling.regression import non_negative
from headrace.profiling.shapes import grid, held_out

BOUNDS = {"max_sequences": 64, "max_step_tokens": 512, "context": 4096, "slots": 400_000}


def machine(shape: StepShape) -> float:
    """A processor that is bound by memory up to 24 rows and by arithmetic beyond, with attention on top; milliseconds."""
    rows = shape.prefill_tokens + shape.decode_tokens
    return 1.5 + max(12.0, 0.5 * rows) + 0.3 * shape.decode_tokens**0.8 + 4e-4 * shape.context + 2e-6 * shape.attended


shapes = st.builds(
    StepShape,
    prefill_tokens=st.integers(0, 3000),
    decode_tokens=st.integers(0, 300),
    context=st.integers(0, 500_000),
    sequences=st.integers(1, 300),
    attended=st.integers(0, 10_000_000),
)


def test_unseen_shapes_are_predicted() -> None:
    noise = np.random.default_rng(0)
    points = [(s.shape, machine(s.shape) * float(noise.lognormal(0, 0.03))) for s in grid(**BOUNDS)]
    cost = fit(points)
    unseen = [s.shape for s in held_out(**BOUNDS, count=60)]
    assert len(unseen) == 60
    assert not {s for s, _ in points} & set(unseen)
    errors = sorted(abs(cost.cost(s) - machine(s)) / machine(s) for s in unseen)
    assert statistics.median(errors) < 0.05
    assert errors[-6] < 0.15, "nine in ten"


def test_a_constant_cost_alone_does_not_pass_that_test() -> None:
    unseen = [s.shape for s in held_out(**BOUNDS, count=60)]
    flat = statistics.median(machine(s.shape) for s in grid(**BOUNDS))
    assert statistics.median(abs(flat - machine(s)) / machine(s) for s in unseen) > 0.2


def test_disturbed_measurements_hardly_matter() -> None:
    points = [(s.shape, machine(s.shape)) for s in grid(**BOUNDS)]
    wild = [(s, ms * (8 if i % 15 == 3 else 1)) for i, (s, ms) in enumerate(points)]
    cost = fit(wild)
    unseen = [s.shape for s in held_out(**BOUNDS, count=60)]
    assert statistics.median(abs(cost.cost(s) - machine(s)) / machine(s) for s in unseen) < 0.1


@given(a=shapes, b=shapes)
def test_cost_rises_with_every_size(a: StepShape, b: StepShape) -> None:
    names = StepShape.__dataclass_fields__
    low = StepShape(*(min(getattr(a, n), getattr(b, n)) for n in names))
    high = StepShape(*(max(getattr(a, n), getattr(b, n)) for n in names))
    assert NOISY.cost(low) <= NOISY.cost(high) * (1 + 1e-12)
    assert NOISY.cost(low) > 0


def _noisy() -> MeasuredProfile:
    noise = np.random.default_rng(7)
    return MeasuredProfile(
        [Point(s.shape, (machine(s.shape) * float(noise.lognormal(0, 0.4)),)) for s in grid(**BOUNDS)]
    )


NOISY = _noisy().base


@given(st.lists(st.floats(0.5, 50.0), min_size=2, max_size=7))
def test_in_one_size_the_first_fit_is_isotonic_regression(values: list[float]) -> None:
    """Ramps between all points span exactly the rising sequences, so least squares over them is pool-adjacent-violators."""
    n = len(values)
    matrix = np.tril(np.ones((n, n)))
    found = matrix @ non_negative(matrix, np.array(values))
    assert found == pytest.approx(pooled(values), rel=1e-6, abs=1e-6)


def pooled(values: list[float]) -> list[float]:
    """Pool adjacent violators."""
    blocks: list[list[float]] = []
    for value in values:
        blocks.append([value])
        while len(blocks) > 1 and statistics.mean(blocks[-2]) > statistics.mean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    return [statistics.mean(block) for block in blocks for _ in block]


@given(st.integers(0, 10_000))
def test_non_negative_least_squares_against_all_supports(seed: int) -> None:
    generator = np.random.default_rng(seed)
    matrix, target = generator.normal(size=(6, 4)), generator.normal(size=6)
    best = float(np.sum(target**2))
    for size in range(1, 5):
        for support in itertools.combinations(range(4), size):
            x = np.linalg.lstsq(matrix[:, support], target, rcond=None)[0]
            if (x >= 0).all():
                best = min(best, float(np.sum((matrix[:, support] @ x - target) ** 2)))
    found = non_negative(matrix, target)
    assert (found >= 0).all()
    assert float(np.sum((matrix @ found - target) ** 2)) == pytest.approx(best, rel=1e-8, abs=1e-10)


def test_curves_go_on_beyond_the_last_knot_and_stand_still_before_the_first() -> None:
    curve = Curve((2.0, 4.0, 8.0), (0.0, 1.0, 5.0))
    assert [curve(x) for x in (0, 2, 3, 4, 6, 8, 10)] == [0, 0, 0.5, 1, 3, 5, 7]
    assert Curve((3.0,), (0.0,))(100) == 0.0


def test_knots_keep_both_ends() -> None:
    assert choose_knots([5, 1, 3, 3], 8) == (1.0, 3.0, 5.0)
    many = choose_knots(range(100), 5)
    assert len(many) == 5
    assert (many[0], many[-1]) == (0.0, 99.0)


def test_one_point_is_enough() -> None:
    shape = StepShape(0, 1, 10, 1, 11)
    assert fit([(shape, 4.0)]).cost(shape) == pytest.approx(4.0)
    assert fit([(shape, 4.0)]).cost(StepShape(100, 1, 10, 1, 11)) == pytest.approx(4.0)


@pytest.mark.parametrize("points", [[], [(StepShape(0, 1, 0, 1, 1), 0.0)], [(StepShape(0, 1, 0, 1, 1), float("nan"))]])
def test_impossible_measurements_are_refused(points: list[tuple[StepShape, float]]) -> None:
    with pytest.raises(ValueError, match="fit: "):
        fit(points)
