"""Fates of draft tokens: independent of policy, distributed as stated, hidden behind beliefs that are wrong as stated."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.core.errors import InvalidRequest
from headrace.engine.simulation.acceptance import (
    CHOICES,
    EXACT,
    Acceptance,
    AcceptanceModel,
    Miscalibration,
    Node,
    draft_token,
)
from headrace.engine.simulation.fit import FITTED, PAIRS, accepted_per_verification, fit, get_acceptance

EASY = Acceptance(ease=1.0)


def walk(model: AcceptanceModel, request: int, start: int, seed: int) -> dict[tuple[int, tuple[int, ...]], bool]:
    """Fates by (position of the first difference, choices from there) along a random mix of trees and chains."""
    rng = random.Random(seed)
    fates: dict[tuple[int, tuple[int, ...]], bool] = {}
    decoded = start
    while decoded < start + 30:
        frontier: list[tuple[Node, tuple[int, ...]]] = [(model.root(request, decoded), ())]
        won = 0
        for depth in range(rng.randint(1, 5)):
            grown = []
            for node, choices in frontier:
                for child in model.children(node, rng.randint(1, 4)):
                    if node.accepted:
                        fates[child.position, (child.choice,)] = child.accepted
                        won = max(won, depth + 1 if child.accepted else 0)
                    assert node.accepted or not child.accepted
                    grown.append((child, (*choices, child.choice)))
            frontier = grown
        decoded += won + 1
    return fates


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 9), request=st.integers(0, 2**64 - 1), walks=st.tuples(st.integers(), st.integers()))
def test_a_node_has_one_fate_whatever_was_drafted_around_it(seed: int, request: int, walks: tuple[int, int]) -> None:
    first = walk(AcceptanceModel(EASY, seed=seed), request, 0, walks[0])
    other = walk(AcceptanceModel(EASY, seed=seed), request, 3, walks[1])
    common = first.keys() & other.keys()
    assert common
    assert {k: first[k] for k in common} == {k: other[k] for k in common}


def test_beliefs_change_no_fate() -> None:
    exact, wrong = (
        AcceptanceModel(EASY, m, seed=4) for m in (EXACT, Miscalibration(temperature=0.3, bias=1.0, noise=2.0))
    )
    for decoded in range(200):
        pairs = zip(exact.children(exact.root(9, decoded), 4), wrong.children(wrong.root(9, decoded), 4), strict=True)
        for mine, other in pairs:
            assert (mine.accepted, mine.chance, mine.key) == (other.accepted, other.chance, other.key)


def test_seeds_requests_and_sources_fail_at_different_places() -> None:
    def fates(model: AcceptanceModel, request: int) -> list[bool]:
        return [model.children(model.root(request, i))[0].accepted for i in range(200)]

    base = fates(AcceptanceModel(EASY, seed=1), 5)
    assert base == fates(AcceptanceModel(EASY, seed=1), 5)
    assert base != fates(AcceptanceModel(EASY, seed=2), 5)
    assert base != fates(AcceptanceModel(EASY, seed=1), 6)
    assert base != fates(AcceptanceModel(EASY, seed=1, source="ngram"), 5)


def test_chances_come_true() -> None:
    """Over many nodes the accepted share is the mean chance, for every choice and for hard and easy nodes apart."""
    model = AcceptanceModel(EASY, EXACT, seed=0)
    by_cell: dict[tuple[int, bool], list[tuple[float, bool]]] = {}
    for request in range(400):
        for decoded in range(25):
            for child in model.children(model.root(request, decoded), 3):
                assert child.belief == pytest.approx(child.chance)
                by_cell.setdefault((child.choice, child.chance > 0.2), []).append((child.chance, child.accepted))
    assert len(by_cell) >= 5
    for cell, seen in by_cell.items():
        mean = sum(c for c, _ in seen) / len(seen)
        spread = math.sqrt(sum(c * (1 - c) for c, _ in seen)) / len(seen)
        assert sum(a for _, a in seen) / len(seen) == pytest.approx(mean, abs=4 * spread), cell


@given(odds=st.floats(-8, 8), request=st.integers(0, 99), width=st.integers(1, CHOICES), noise=st.floats(0, 3))
def test_siblings_are_one_distribution(odds: float, request: int, width: int, noise: float) -> None:
    model = AcceptanceModel(Acceptance(ease=odds), Miscalibration(noise=noise))
    children = model.children(model.root(request, 3), width)
    assert len(children) == width
    for values in ([c.belief for c in children], [c.chance for c in children]):
        assert values == sorted(values, reverse=True)
        assert 0 <= sum(values) < 1
    assert sum(c.accepted for c in children) <= 1
    assert children == model.children(model.root(request, 3), CHOICES)[:width]


def test_miscalibration_is_what_it_says() -> None:
    def log_odds(p: float) -> float:
        return math.log(p / (1 - p))

    truth, bent = AcceptanceModel(EASY, EXACT), AcceptanceModel(EASY, Miscalibration(2.0, 0.5, 0.0))
    noisy = AcceptanceModel(EASY, Miscalibration(1.0, 0.0, 0.7))
    errors = []
    for request in range(3000):
        true = log_odds(truth.children(truth.root(request, 0))[0].chance)
        assert log_odds(bent.children(bent.root(request, 0))[0].belief) == pytest.approx(true / 2 + 0.5)
        errors.append(log_odds(noisy.children(noisy.root(request, 0))[0].belief) - true)
    mean = sum(errors) / len(errors)
    assert mean == pytest.approx(0, abs=0.05)
    assert math.sqrt(sum((e - mean) ** 2 for e in errors) / len(errors)) == pytest.approx(0.7, rel=0.06)


def test_spreads_are_standard_deviations() -> None:
    """Of log odds: requests alone, stretches alone (equal inside one), tokens alone."""
    for name in ("request_spread", "stretch_spread", "token_spread"):
        flat = {"request_spread": 0.0, "stretch_spread": 0.0, "token_spread": 0.0} | {name: 0.8}
        model = AcceptanceModel(Acceptance(ease=0.0, stretch=5, **flat), EXACT)
        odds = []
        for request in range(2000):
            row = [model.children(model.root(request, i))[0].chance for i in (5, 6, 11)]
            assert (row[0] == row[1]) == (name != "token_spread")
            assert (row[0] == row[2]) == (name == "request_spread")
            odds.append(math.log(row[0] / (1 - row[0])))
        assert math.sqrt(sum(o * o for o in odds) / len(odds)) == pytest.approx(0.8, rel=0.08)


def test_a_chain_is_the_first_choices_and_tokens_tell_them_apart() -> None:
    model = AcceptanceModel(EASY)
    root = model.root(1, 4)
    chain = model.chain(root, 6)
    assert [n.position for n in chain] == [4, 5, 6, 7, 8, 9]
    assert chain[0] == model.children(root)[0]
    assert sorted((n.accepted for n in chain), reverse=True) == [n.accepted for n in chain]
    tokens = [draft_token(n, 31_999, 32_000) for n in model.children(root, CHOICES)]
    assert len(set(tokens)) == CHOICES
    assert all(0 <= t < 32_000 for t in tokens)


@pytest.mark.parametrize("pair", sorted(PAIRS))
def test_fitted_pairs_accept_what_was_published(pair: str) -> None:
    for depth, mean in PAIRS[pair].published.items():
        assert accepted_per_verification(get_acceptance(pair), depth, answers=60) == pytest.approx(mean, rel=0.08)


def test_a_fit_finds_the_ease_it_was_made_with() -> None:
    hidden = Acceptance(ease=1.5, request_spread=0.2)
    published = {3: accepted_per_verification(hidden, 3, answers=60, seed=8)}
    assert fit(published, Acceptance(ease=0, request_spread=0.2), answers=15).ease == pytest.approx(1.5, abs=0.2)


def test_wrong_parameters_are_named() -> None:
    for make in (
        lambda: Acceptance(ease=math.nan),
        lambda: Acceptance(ease=0, sibling=1.0),
        lambda: Acceptance(ease=0, stretch=0),
        lambda: Acceptance(ease=0, token_spread=-1),
        lambda: Miscalibration(temperature=0),
        lambda: Miscalibration(noise=-1),
        lambda: fit({}),
        lambda: fit({4: 4.5}),
        lambda: get_acceptance("magic"),
    ):
        with pytest.raises(InvalidRequest):
            make()
    assert set(FITTED) == set(PAIRS)
