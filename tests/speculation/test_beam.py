"""Beam search against exhaustive search over a tiny vocabulary, and the theorem that makes it enough."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.core.speculation import DraftTree
from headrace.speculation.beam import Beam
from headrace.speculation.forest import Forest
from headrace.speculation.select import select

VOCAB = 3


class Language:
    """A random next-token distribution for every text."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def next(self, text: tuple[int, ...]) -> np.ndarray:
        weights = np.random.default_rng((self._seed, len(text), *text)).gamma(0.4, size=VOCAB) + 1e-3
        return np.asarray(weights / weights.sum())

    def path(self, text: tuple[int, ...]) -> float:
        return float(np.prod([self.next(text[:i])[token] for i, token in enumerate(text)]))


def paths(tree: DraftTree) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens.tolist(), tree.parents.tolist(), strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), token))
    return found


def searched(languages: list[Language], depth: int, width: int) -> list[DraftTree]:
    beam = Beam(width)
    texts: list[list[tuple[int, ...]]] = [[()] for _ in languages]
    for _ in range(depth):
        rows = np.array([[language.next(t) for t in mine] for language, mine in zip(languages, texts, strict=True)])
        tokens = np.broadcast_to(np.arange(VOCAB, dtype=np.int32), rows.shape)
        beam.grow(tokens, np.log(rows))
        texts = [
            [(*mine[above], token) for above, token in zip(beam.above[-1][s], beam.tokens[-1][s].tolist(), strict=True)]
            for s, mine in enumerate(texts)
        ]
    return beam.trees()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 4), st.integers(1, 5))
def test_layers_hold_the_likeliest_extensions_of_the_layer_above(seed: int, depth: int, width: int) -> None:
    languages = [Language(seed), Language(seed + 1)]
    for language, tree in zip(languages, searched(languages, depth, width), strict=True):
        found = paths(tree)
        above: list[tuple[int, ...]] = [()]
        for layer in range(1, depth + 1):
            options = [(*text, token) for text in above for token in range(VOCAB)]
            above = sorted(options, key=language.path, reverse=True)[:width]
            assert set(above) == {p for p in found if len(p) == layer}
        assert tree.probabilities == pytest.approx([language.path(p) for p in found])
        assert tree.depths.tolist() == [len(p) for p in found]
        held = np.where(tree.parents < 0, 1.0, tree.probabilities[tree.parents])
        assert (tree.probabilities <= held).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 6))
def test_a_beam_as_wide_as_the_budget_contains_the_optimum(seed: int, budget: int) -> None:
    """Theorem 4.1: the best tree of so many nodes, found among all paths, is found in the beam too."""
    language = Language(seed)
    everything = [text for length in range(1, budget + 1) for text in itertools.product(range(VOCAB), repeat=length)]
    most = sorted((language.path(text) for text in everything), reverse=True)[:budget]
    (tree,) = searched([language], budget, budget)
    chosen = select(Forest([tree]), np.zeros(1), budget)
    assert Forest([tree]).expected(chosen.taken)[0] == pytest.approx(1.0 + sum(most))


def test_a_narrow_beam_need_not_contain_it() -> None:
    """Negative control: width 1 misses the second child of the root."""
    language = Language(3)
    (narrow,), (wide,) = searched([language], 2, 1), searched([language], 2, 2)
    assert len(narrow) == 2
    assert narrow.is_chain
    assert select(Forest([wide]), np.zeros(1), 3).total > select(Forest([narrow]), np.zeros(1), 3).total


def test_trees_are_cut_to_their_own_depth() -> None:
    beam = Beam(2)
    for _ in range(3):
        rows = np.full((2, 1 if not beam.tokens else 2, 2), np.log(0.5))
        beam.grow(np.broadcast_to(np.array([4, 5], np.int32), rows.shape), rows)
    assert [len(tree) for tree in beam.trees([1, 3])] == [2, 6]
    assert Beam(2).trees() == []
