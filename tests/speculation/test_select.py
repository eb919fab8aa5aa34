"""Selection against brute force over every connected choice, the published example, and what must hold for any instance."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.speculation.forests import connected, trees

from headrace.core.speculation import DraftTree
from headrace.speculation.forest import Forest
from headrace.speculation.select import best_yield, ladder, select

EPSILON = 1e-9


def best(candidates: list[DraftTree], need: list[float], budget: int) -> float | None:
    """Most tokens to expect with every need met, by trying everything; None when that cannot be."""
    options = [
        {(len(nodes), float(sum(t.probabilities[n] for n in nodes))) for nodes in connected(t)} for t in candidates
    ]
    found = None
    for choice in itertools.product(*options):
        if sum(size for size, _ in choice) > budget:
            continue
        if any(1.0 + gain < n - EPSILON for (_, gain), n in zip(choice, need, strict=True)):
            continue
        total = len(candidates) + sum(gain for _, gain in choice)
        found = total if found is None else max(found, total)
    return found


def needs(draw: st.DrawFn, candidates: list[DraftTree]) -> list[float]:
    """Targets of all kinds: none, within reach, exactly what some nodes give, out of reach."""
    made = []
    for tree in candidates:
        sums = [1.0 + float(np.sort(tree.probabilities)[::-1][:k].sum()) for k in range(len(tree) + 1)]
        made.append(draw(st.sampled_from(sums) | st.floats(0.0, 3.0)))
    return made


@st.composite
def instances(draw: st.DrawFn, requests: int = 3, nodes: int = 5) -> tuple[list[DraftTree], list[float], int]:
    candidates = draw(st.lists(trees(nodes), min_size=1, max_size=requests))
    return candidates, needs(draw, candidates), draw(st.integers(0, sum(map(len, candidates)) + 1))


@settings(max_examples=300, deadline=None)
@given(instances())
def test_verdict_and_objective_equal_brute_force(instance: tuple[list[DraftTree], list[float], int]) -> None:
    candidates, need, budget = instance
    chosen = select(Forest(candidates), np.array(need), budget)
    expected = best(candidates, need, budget)
    assert bool(chosen.met.all()) == (expected is not None)
    if expected is not None:
        assert Forest(candidates).expected(chosen.taken).sum() == pytest.approx(expected, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.lists(trees(7), min_size=2, max_size=2), st.data())
def test_two_requests_of_seven_nodes(candidates: list[DraftTree], data: st.DataObject) -> None:
    need, budget = needs(data.draw, candidates), data.draw(st.integers(0, 14))
    chosen = select(Forest(candidates), np.array(need), budget)
    expected = best(candidates, need, budget)
    assert bool(chosen.met.all()) == (expected is not None)
    if expected is not None:
        assert Forest(candidates).expected(chosen.taken).sum() == pytest.approx(expected, abs=1e-9)


@settings(max_examples=200, deadline=None)
@given(instances(6, 12), st.none() | st.integers(0, 6), st.sampled_from(["most", "least", "fewest"]))
def test_any_instance(instance: tuple[list[DraftTree], list[float], int], n_max: int | None, first: str) -> None:
    """The budget holds to the node, trees are connected, caps hold, and a larger budget never gives less."""
    candidates, need, budget = instance
    forest, wanted = Forest(candidates), np.array(need)
    chosen = select(forest, wanted, budget, n_max=n_max, first=first)
    assert chosen.total == min(budget, sum(map(len, candidates)))
    assert (chosen.owed <= chosen.taken).all()
    if n_max is not None:
        assert (chosen.owed <= n_max).all()
    for tree, nodes in zip(candidates, forest.nodes(chosen.taken), strict=True):
        assert len(tree.part(np.sort(nodes))) == len(set(nodes.tolist()))
        for place, node in enumerate(nodes.tolist()):
            assert tree.parents[node] == -1 or tree.parents[node] in nodes[:place]
    if first == "fewest":
        whole = forest.fewest(wanted)
        assert ((chosen.owed == 0) | (chosen.owed == whole)).all()
    more = select(forest, wanted, budget + 1, n_max=n_max, first=first)
    assert more.total >= chosen.total
    if n_max is None and bool(chosen.met.all()):
        assert bool(more.met.all())
        assert forest.expected(more.taken).sum() >= forest.expected(chosen.taken).sum() - EPSILON


@settings(max_examples=100, deadline=None)
@given(instances(5, 8), st.randoms())
def test_order_of_requests_does_not_matter(instance: tuple[list[DraftTree], list[float], int], random) -> None:
    candidates, need, budget = instance
    turn = list(range(len(candidates)))
    random.shuffle(turn)
    here = select(Forest(candidates), np.array(need), budget)
    there = select(Forest([candidates[i] for i in turn]), np.array([need[i] for i in turn]), budget)
    assert bool(here.met.all()) == bool(there.met.all())
    assert here.total == there.total
    if bool(here.met.all()):
        one = Forest(candidates).expected(here.taken).sum()
        two = Forest([candidates[i] for i in turn]).expected(there.taken).sum()
        assert one == pytest.approx(two, abs=1e-9)


FIGURE_5 = [
    DraftTree.of([0, 1, 2, 3, 4, 5], [-1, -1, 0, 0, 2, 2], [0.7, 0.2, 0.6, 0.3, 0.7, 0.3]),
    DraftTree.of([0, 1, 2, 3, 4, 5], [-1, -1, 0, 1, 2, 2], [0.5, 0.4, 0.7, 0.6, 0.4, 0.4]),
]


def test_the_published_example() -> None:
    """Figure 5 of the paper: budget 8 with two roots, needs of 0.6 and 0.8 beside them."""
    assert FIGURE_5[0].probabilities == pytest.approx([0.7, 0.2, 0.42, 0.21, 0.294, 0.126])
    assert FIGURE_5[1].probabilities == pytest.approx([0.5, 0.4, 0.35, 0.24, 0.14, 0.14])
    forest = Forest(FIGURE_5)
    chosen = select(forest, np.array([1.6, 1.8]), 8 - 2)
    assert [set(n.tolist()) for n in forest.nodes(chosen.owed)] == [{0}, {0, 1}]
    rest = [forest.nodes(chosen.taken)[r][chosen.owed[r] :].tolist() for r in range(2)]
    assert rest == [[2, 4], [2]]  # .42, .294 and .35
    assert forest.expected(chosen.taken) == pytest.approx([1 + 0.7 + 0.42 + 0.294, 1 + 0.5 + 0.4 + 0.35])


def test_without_the_slo_phase_the_example_ends_otherwise() -> None:
    """Negative control: the fixture tells the two phases apart once a target binds."""
    forest = Forest(FIGURE_5)
    greedy = select(forest, np.zeros(2), 2)
    urged = select(forest, np.array([1.0, 1.8]), 2)
    assert greedy.taken.tolist() == [1, 1]
    assert urged.taken.tolist() == [0, 2]


def test_conditional_probabilities_instead_of_path_probabilities_are_noticed() -> None:
    """Negative control: the published line 15 adds conditionals, which believes in a chain of 0.5 too soon."""
    tree = DraftTree.chain([1, 2, 3], [0.5, 0.5, 0.5])
    assert Forest([tree]).fewest(np.array([1.8])).tolist() == [3]
    conditional = DraftTree(tree.tokens, tree.parents, tree.depths, tree.conditionals)
    assert Forest([conditional]).fewest(np.array([1.8])).tolist() == [2]


def test_a_certain_child_comes_after_its_parent() -> None:
    tree = DraftTree.of([5, 6, 7], [-1, 0, 1], [0.5, 1.0, 1.0])
    forest = Forest([tree, tree])
    for budget in range(7):
        for nodes in forest.nodes(select(forest, np.zeros(2), budget).taken):
            assert nodes.tolist() == list(range(len(nodes)))


def test_whom_the_slo_phase_serves_when_it_cannot_serve_all() -> None:
    """Needs of 1.9 and 1.5 where nodes give 0.5, 0.25, 0.125...: three nodes or one; the budget is one, or three."""
    chain = DraftTree.chain(range(5), [0.5] * 5)
    forest, need = Forest([chain, chain]), np.array([1.8, 1.5])
    assert select(forest, need, 3, first="most").owed.tolist() == [3, 0]
    assert select(forest, need, 3, first="least").owed.tolist() == [2, 1]
    assert select(forest, need, 3, first="fewest").owed.tolist() == [0, 1]
    assert select(forest, need, 3, first="most", n_max=2).owed.tolist() == [2, 1]


def test_weights_move_the_throughput_phase_only() -> None:
    chain = DraftTree.chain(range(3), [0.5] * 3)
    forest = Forest([chain, chain])
    assert select(forest, np.zeros(2), 2, weights=np.array([1.0, 5.0])).taken.tolist() == [0, 2]
    assert select(forest, np.array([1.5, 0.0]), 2, weights=np.array([1.0, 5.0])).taken.tolist() == [1, 1]


def test_nodes_that_do_not_pay_are_left() -> None:
    chain = DraftTree.chain(range(4), [0.5] * 4)
    forest = Forest([chain])
    assert select(forest, np.zeros(1), 4, worth=lambda owed, gains: int((gains > 0.2).sum())).taken.tolist() == [2]


@settings(max_examples=200, deadline=None)
@given(
    gains=st.lists(st.floats(0.0, 1.0), max_size=60).map(lambda g: sorted(g, reverse=True)),
    expected=st.floats(0.5, 20.0),
    fixed=st.floats(1.0, 100.0),
    slope=st.floats(0.0, 5.0),
    knee=st.integers(0, 40),
)
def test_best_yield_equals_trying_every_size(gains, expected, fixed, slope, knee) -> None:
    """On a machine that is flat up to a knee and then rises."""
    spent = np.array([fixed + slope * max(0, rows - knee) for rows in range(len(gains) + 5)])
    size = best_yield(expected, np.array(gains), spent)
    tried = [(expected + sum(gains[:k])) / spent[k] for k in range(len(gains) + 1)]
    assert tried[size] == pytest.approx(max(tried))


def test_best_yield_takes_the_fewest_of_equals() -> None:
    assert best_yield(4.0, np.array([0.9, 0.8, 0.0, 0.0]), np.ones(5)) == 2
    assert best_yield(4.0, np.array([0.0, 0.0]), np.ones(3)) == 0


def test_ladder() -> None:
    assert ladder(3, 3) == [3]
    rungs = ladder(0, 500)
    assert rungs[0] == 0
    assert rungs[-1] == 500
    assert rungs == sorted(set(rungs))
    assert len(rungs) < 20
