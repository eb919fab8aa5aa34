"""The compiled searches select what the reference selects."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.sparse import search
from headrace.sparse.codebook import Codes
from headrace.sparse.index import PQIndex, attended
from headrace.sparse.search import CellIndex, ScanIndex, compiled_kind

SHAPES = [Codes(2, 3), Codes(2, 6), Codes(1, 5), Codes(3, 2), Codes(4, 8)]


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _same_choice(found: PQIndex, reference: PQIndex, queries: torch.Tensor, k: int) -> None:
    """Equal weights, best to worst, and nothing twice; ties may fall either way."""
    weights = attended(reference.scores(queries, 0.3))
    one, other = found.select(queries, k, 0.3), reference.select(queries, k, 0.3)
    assert one.shape == other.shape
    for row in range(len(weights)):
        assert len(set(one[row].tolist())) == one.shape[1]
        ranked = weights[row, one[row]].sort(descending=True).values
        torch.testing.assert_close(ranked, weights[row, other[row]], rtol=1e-3, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    codes=st.sampled_from(SHAPES), rows=st.integers(1, 3), group=st.integers(1, 4), count=st.integers(1, 90),
    k=st.integers(1, 100), loud=st.floats(0.01, 30.0), seed=st.integers(0, 99), padded=st.booleans(),
)  # fmt: skip
def test_the_choice_is_the_references(
    codes: Codes, rows: int, group: int, count: int, k: int, loud: float, seed: int, padded: bool
) -> None:
    keys, queries = _random(rows, count, 12, seed=seed), _random(rows, group, 12, seed=seed + 1) * loud
    skip = torch.arange(rows) * (count // (rows + 1)) if padded else None
    reference = PQIndex(codes)
    reference.build(keys, skip)
    for kind in (CellIndex, ScanIndex):
        if kind is CellIndex and codes.bits * codes.subspaces > search.CELL_BITS:
            continue
        index = kind(codes)
        index.build(keys, skip)
        _same_choice(index, reference, queries, k)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 40)), max_size=12), st.sampled_from([Codes(2, 4), Codes(2, 8)]))
def test_growing_and_shrinking_keeps_the_choice(moves: list[tuple[bool, int]], codes: Codes) -> None:
    keys = _random(2, 1200, 8)
    index, reference = compiled_kind(codes, torch.device("cpu"))(codes, iterations=3), PQIndex(codes, iterations=3)
    assert type(index) is not PQIndex
    for one in (index, reference):
        one.build(keys[:, :60], torch.tensor([0, 7]))
    length = 60
    for turn, (grow, amount) in enumerate(moves):
        amount = amount * 4 if grow else min(amount, length - 10)
        length = length + amount if grow else length - amount
        for one in (index, reference):
            if grow:
                one.append(_random(2, amount, 8, seed=turn))
            else:
                one.truncate(length)
        _same_choice(index, reference, _random(2, 2, 8, seed=turn), 9)


def test_rows_reordered() -> None:
    keys = _random(3, 80, 8)
    index, reference = CellIndex(Codes(2, 3)), PQIndex(Codes(2, 3))
    for one in (index, reference):
        one.build(keys)
        one.select(_random(3, 2, 8), 5, 0.3)
        one.select_rows(torch.tensor([2, 0, 2, 1]))
    _same_choice(index, reference, _random(4, 2, 8), 11)


def test_the_newest_of_a_cell_comes_first() -> None:
    keys = torch.ones(1, 50, 4)
    for kind in (CellIndex, ScanIndex):
        index = kind(Codes(2, 2))
        index.build(keys[:, :40])
        index.append(keys[:, 40:])
        assert sorted(index.select(_random(1, 2, 4), 7, 1.0)[0].tolist()) == list(range(43, 50))


def test_a_forgotten_tail_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a search that overlooks keys appended since the last sort fails the comparison."""
    keys = _random(1, 300, 8)
    index, reference = CellIndex(Codes(2, 3)), PQIndex(Codes(2, 3))
    for one in (index, reference):
        one.build(keys[:, :200])
    index.select(_random(1, 1, 8), 5, 0.3)
    monkeypatch.setattr(index, "_catch_up", lambda: None)
    for one in (index, reference):
        one.append(keys[:, 200:])
    index._known = index._sorted = 200
    index._cells[:, 200:] = 0
    with pytest.raises(AssertionError):
        _same_choice(index, reference, _random(1, 1, 8, seed=3), 60)
