"""The verification rule in exact arithmetic: the law of the output is the model's, for any tree, however it was built."""

from __future__ import annotations

import itertools
import random
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.core.speculation import ROOT, DraftTree
from headrace.engine.verify import Walk, settled, verify

VOCAB = 4
LENGTH = 3

Law = dict[tuple[int, ...], Fraction]


class Model:
    """Exact next-token probabilities of every text, from a seed; some are 0."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def next(self, text: tuple[int, ...]) -> list[Fraction]:
        drawn = random.Random(f"{self._seed} {text}")
        weights = [drawn.randint(0, 5) for _ in range(VOCAB)]
        weights[drawn.randrange(VOCAB)] += 1
        return [Fraction(w, sum(weights)) for w in weights]


def law_of(model: Model) -> Law:
    """Law of the first ``LENGTH`` tokens."""
    law: Law = {}
    for text in itertools.product(range(VOCAB), repeat=LENGTH):
        p = Fraction(1)
        for i, token in enumerate(text):
            p *= model.next(text[:i])[token]
        law[text] = p
    return law


def verified_law(model: Model, tree: DraftTree, rule=verify) -> tuple[Law, Fraction]:
    """Law of the first ``LENGTH`` tokens when a step verifies ``tree``, later ones being drawn plainly; and the mean tokens a step.

    Every outcome of every draw is followed with its exact probability.
    """
    law: Law = dict.fromkeys(itertools.product(range(VOCAB), repeat=LENGTH), Fraction(0))
    mean = Fraction(0)

    def follow(script: tuple[int, ...], p: Fraction) -> None:
        """Replay the draws in ``script``; where it ends, branch on the next draw."""
        nonlocal mean
        text: list[int] = []
        remaining = list(script)

        class NextDraw(Exception):
            pass

        def draw(node: int) -> int:
            if not remaining:
                raise NextDraw
            text.append(remaining.pop(0))
            return text[-1]

        try:
            drawn, _ = rule(tree, draw, lambda token: token)
        except NextDraw:
            for token, q in enumerate(model.next(tuple(text))):
                if q:
                    follow((*script, token), p * q)
            return
        mean += p * len(drawn)
        rest = max(0, LENGTH - len(drawn))
        for tail in itertools.product(range(VOCAB), repeat=rest):
            whole, q = tuple(drawn) + tail, p
            for i in range(len(drawn), len(whole)):
                q *= model.next(whole[:i])[whole[i]]
            law[whole[:LENGTH]] += q

    follow((), Fraction(1))
    return law, mean


@st.composite
def drafts(draw: st.DrawFn) -> DraftTree:
    """Any tree of depth up to 2, with children that repeat each other and tokens the model never says."""
    count = draw(st.integers(0, 6))
    tokens = draw(st.lists(st.integers(0, VOCAB), min_size=count, max_size=count))
    parents: list[int] = []
    for node in range(count):
        roots = [n for n in range(node) if parents[n] == ROOT]
        parents.append(draw(st.sampled_from([ROOT, *roots])))
    return DraftTree.of(tokens, parents, [0.5] * count)


@settings(max_examples=120, deadline=None)
@given(st.integers(0, 10_000), drafts())
def test_the_law_of_the_output_is_the_models(seed: int, tree: DraftTree) -> None:
    model = Model(seed)
    law, mean = verified_law(model, tree)
    assert law == law_of(model)
    # The expected number of committed tokens is the sum of the true path probabilities, root included.
    reached = Fraction(1)
    for path in {text_of(tree, node) for node in range(len(tree))}:
        p = Fraction(1)
        for i, token in enumerate(path):
            p *= model.next(path[:i])[token] if token < VOCAB else 0
        reached += p
    assert mean == reached


def text_of(tree: DraftTree, node: int) -> tuple[int, ...]:
    text: tuple[int, ...] = ()
    while node != ROOT:
        text = (int(tree.tokens[node]), *text)
        node = int(tree.parents[node])
    return text


def test_a_rule_that_takes_drafts_on_trust_has_another_law() -> None:
    """Negative control: accepting a child because the draft is sure of it, without drawing it, bends the law."""

    def trusting(tree, draw, token_of):
        drawn, path = verify(tree, draw, token_of)
        return ([int(tree.tokens[0]), *drawn[1:]], path) if len(tree) else (drawn, path)

    model = Model(1)
    tree = DraftTree.of([0, 1], [ROOT, 0], [0.9, 0.9])
    assert verified_law(model, tree, trusting)[0] != law_of(model)


def test_the_walk_goes_on_where_a_child_matches() -> None:
    tree = DraftTree.of([5, 6, 7, 7, 8], [ROOT, ROOT, 0, 1, 3], [0.5] * 5)
    says = {ROOT: 6, 1: 7, 3: 9}
    assert verify(tree, says.__getitem__, lambda token: token) == ([6, 7, 9], [1, 3])
    assert verify(tree, {ROOT: 4}.__getitem__, lambda token: token) == ([4], [])


def test_of_equal_children_the_first_stands_for_all() -> None:
    tree = DraftTree.of([5, 5, 9], [ROOT, ROOT, 1], [0.4] * 3)
    walk = Walk(tree)
    assert walk.step(5)
    assert walk.step(9)
    assert walk.path == [0, 2]


def test_an_empty_tree_is_a_plain_step() -> None:
    walk = Walk(None)
    assert not walk.step(3)
    assert walk.node == ROOT


@given(st.integers(0, 9), st.data())
def test_slots_are_kept_or_freed_never_both(count: int, data: st.DataObject) -> None:
    slots = np.array(data.draw(st.permutations(range(20))))[: count + 1].astype(np.int32)
    path = sorted(data.draw(st.sets(st.integers(0, count - 1)) if count else st.just(set())))
    kept, gone = settled(slots, path)
    assert kept.tolist() == [slots[0], *(slots[n + 1] for n in path)]
    assert sorted([*kept.tolist(), *gone.tolist()]) == sorted(slots.tolist())


def test_parts_of_a_tree_stay_connected() -> None:
    tree = DraftTree.of([1, 2, 3, 4], [ROOT, 0, 0, 2], [0.5] * 4)
    part = tree.part(np.array([0, 2, 3], np.int32))
    assert part.tokens.tolist() == [1, 3, 4]
    assert part.parents.tolist() == [ROOT, 0, 1]
    with pytest.raises(ValueError, match="without its parent"):
        tree.part(np.array([0, 3], np.int32))


def test_the_real_sampler_keeps_the_law() -> None:
    """Chi-square of 30,000 verified answers of two tokens, with a penalty and a nucleus, against exact probabilities."""
    import torch
    from tests.engine import naive

    from headrace.core.protocols import StepResult
    from headrace.core.request import SamplingParams
    from headrace.engine.sampling.sampler import Draw, TorchSampler, stream_key

    drawn = random.Random(5)
    rows = [
        [drawn.gauss(0.0, 1.2) for _ in range(6)] for _ in range(1 + 6)
    ]  # after the root, and after each first token
    tree = DraftTree.of([2, 4, 2, 1], [ROOT, ROOT, 0, 1], [0.5] * 4)
    params = SamplingParams(temperature=0.9, top_p=0.9, repetition_penalty=1.3, presence_penalty=0.3)
    logits = torch.tensor([rows[0], *(rows[1 + token] for token in (2, 4, 0, 0))])
    sampler, prompt = TorchSampler(), (1, 3)
    count = 30_000
    seen: dict[tuple[int, ...], float] = {}
    for answer in range(count):
        output: list[int] = []

        def draw(node: int, seed: int = stream_key(answer), output: list[int] = output) -> int:
            drawn = Draw(node + 1, params, seed, len(output), prompt, output)
            (outcome,) = sampler.sample(StepResult(logits), [drawn])
            output.append(outcome.token)
            return outcome.token

        tokens, _ = verify(tree, draw, lambda token: token)
        seen[tuple(tokens[:2])] = seen.get(tuple(tokens[:2]), 0) + 1
    first = naive.distribution(naive.processed(rows[0], params, prompt), params)
    expected: dict[tuple[int, ...], float] = {}
    for token, p in enumerate(first):
        if token not in (2, 4):
            expected[(token,)] = p
            continue
        second = naive.distribution(naive.processed(rows[1 + token], params, prompt, [token]), params)
        for after, q in enumerate(second):
            expected[token, after] = p * q
    assert set(seen) <= {text for text, p in expected.items() if p > 0}
    chi = sum((seen.get(t, 0) - count * p) ** 2 / (count * p) for t, p in expected.items() if p > 0)
    degrees = sum(p > 0 for p in expected.values()) - 1
    assert chi < degrees + 5 * (2 * degrees) ** 0.5
