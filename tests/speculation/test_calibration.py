"""Calibration: what is learnt from verified drafts, per source and per request, and how it is used."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.speculation.forests import trees

from headrace.core.speculation import ROOT, DraftTree, empty_tree
from headrace.speculation.calibration import OnlineCalibration


class World:
    """Drafts whose truth is the log odds they state, divided, shifted, and shifted again for each request."""

    def __init__(self, slope: float, bias: float, offsets: dict[int, float], seed: int = 0) -> None:
        self._slope, self._bias, self._offsets = slope, bias, offsets
        self._random = random.Random(seed)

    def truth(self, sequence: int, stated: float) -> float:
        odds = self._slope * math.log(stated / (1 - stated)) + self._bias + self._offsets.get(sequence, 0.0)
        return 1 / (1 + math.exp(-odds))

    def verify(self, calibration: OnlineCalibration, sequence: int, depth: int = 5) -> None:
        """One draft, calibrated as the engine does it, then verified."""
        stated = [self._random.uniform(0.3, 0.97) for _ in range(depth)]
        tree = DraftTree.chain(range(depth), stated, "draft")
        calibration.calibrated(sequence, tree)
        accepted: list[int] = []
        for node, q in enumerate(stated):
            if self._random.random() >= self.truth(sequence, q):
                break
            accepted.append(node)
        calibration.observe(sequence, tree, accepted)

    def error(self, calibration: OnlineCalibration, sequence: int) -> float:
        """Largest error of a calibrated probability over what is stated."""
        return max(
            abs(
                calibration.calibrated(sequence, DraftTree.chain([1], [q], "draft")).probabilities[0]
                - self.truth(sequence, q)
            )
            for q in np.linspace(0.3, 0.97, 20).tolist()
        )


@pytest.mark.parametrize(("slope", "bias"), [(1.0, 0.0), (0.6, -0.3), (1.4, 0.5), (0.8, -1.5)])
def test_a_drafts_self_confidence_is_corrected(slope: float, bias: float) -> None:
    world, calibration = World(slope, bias, {}), OnlineCalibration()
    for turn in range(400):
        world.verify(calibration, turn % 8)
    errors = [world.error(calibration, sequence) for sequence in range(8)]
    assert sum(errors) / len(errors) < 0.12


def test_hard_and_easy_requests_are_told_apart() -> None:
    world, calibration = World(1.0, 0.0, {1: -1.5, 2: 1.5}), OnlineCalibration()
    for _ in range(150):
        world.verify(calibration, 1)
        world.verify(calibration, 2)
    chain = DraftTree.chain([1], [0.7], "draft")
    hard, easy = (float(calibration.calibrated(n, chain).probabilities[0]) for n in (1, 2))
    assert hard == pytest.approx(world.truth(1, 0.7), abs=0.15)
    assert easy == pytest.approx(world.truth(2, 0.7), abs=0.15)
    survival = calibration.survival([1, 2, 3], "draft", 6)
    assert (survival[:, 0] < survival[:, 2]).all()
    assert (survival[:, 2] < survival[:, 1]).all()
    calibration.forget(1)
    assert calibration.survival([1], "draft", 6)[:, 0] == pytest.approx(survival[:, 2])


def test_a_change_of_the_drafts_quality_is_followed() -> None:
    calibration = OnlineCalibration()
    good, bad = World(1.0, 1.0, {}), World(1.0, -1.5, {}, seed=1)
    for turn in range(300):
        good.verify(calibration, turn % 4)
    before = bad.error(calibration, 99)
    for turn in range(1500):
        bad.verify(calibration, 10 + turn % 100)  # new requests, whose offsets cannot explain it
    assert bad.error(calibration, 99) < before / 2


def test_without_observations_a_draft_is_believed() -> None:
    tree = DraftTree.chain([1, 2], [0.9, 0.5], "draft")
    assert OnlineCalibration().calibrated(1, tree).probabilities == pytest.approx([0.9, 0.45])


@settings(max_examples=150, deadline=None)
@given(trees(12), st.integers(0, 50))
def test_calibrated_trees_stay_trees(tree: DraftTree, turns: int) -> None:
    """Children never exceed their parent, siblings never 1 together, whatever was learnt."""
    world, calibration = World(0.5, 2.0, {}), OnlineCalibration()
    for _ in range(turns):
        world.verify(calibration, 1)
    made = calibration.calibrated(1, tree)
    above = np.where(made.parents == ROOT, 1.0, made.probabilities[made.parents])
    assert (made.probabilities <= above + 1e-12).all()
    together = np.bincount(made.parents + 1, weights=made.probabilities, minlength=len(made) + 1)
    limits = np.concatenate([[1.0], made.probabilities])
    assert (together <= limits + 1e-9).all()
    assert np.isfinite(made.probabilities).all()


def test_only_open_fates_teach() -> None:
    """A node below a rejected one was never tried: its rejection says nothing."""
    one, other = OnlineCalibration(), OnlineCalibration()
    long, short = DraftTree.chain([1, 2, 3], [0.9, 0.9, 0.9], "draft"), DraftTree.chain([1], [0.9], "draft")
    for _ in range(10):
        one.observe(1, long, [])
        other.observe(1, short, [])
    chain = DraftTree.chain([5], [0.9], "draft")
    assert one.calibrated(1, chain).probabilities == pytest.approx(other.calibrated(1, chain).probabilities)


def test_survival_follows_what_drafts_promise_and_what_they_do_not_offer() -> None:
    calibration = OnlineCalibration()
    sure = DraftTree.chain(range(8), [0.99] * 8, "draft")
    for _ in range(300):
        calibration.calibrated(1, sure)
    assert calibration.survival([2], "draft", 8)[-1, 0] > 0.8
    assert (np.diff(calibration.survival([2], "draft", 12)[:, 0]) < 0).all()
    for _ in range(300):
        calibration.calibrated(1, empty_tree("draft"))
    assert calibration.survival([2], "draft", 8)[0, 0] < 0.05


def test_the_first_drafts_of_a_source_count_for_more() -> None:
    """A source that offers nothing is known for it after some tens of drafts; one that is known to be good is not forgotten as soon."""
    fresh, known = OnlineCalibration(), OnlineCalibration()
    for _ in range(400):
        known.calibrated(1, DraftTree.chain([1, 2], [0.9, 0.9], "draft"))
    for _ in range(20):
        fresh.calibrated(1, empty_tree("draft"))
        known.calibrated(1, empty_tree("draft"))
    assert fresh.survival([2], "draft", 1)[0, 0] < 0.2
    assert known.survival([2], "draft", 1)[0, 0] > 0.5


def test_layers_that_are_not_drafted_do_not_stay_as_bad_as_they_were() -> None:
    calibration = OnlineCalibration()
    for _ in range(300):
        calibration.calibrated(1, DraftTree.chain(range(6), [0.1] * 6, "draft"))
    assert calibration.survival([2], "draft", 6)[3, 0] < 1e-3
    for _ in range(300):
        calibration.calibrated(1, DraftTree.chain(range(2), [0.9] * 2, "draft"))
    assert calibration.survival([2], "draft", 6)[3, 0] > 0.4
