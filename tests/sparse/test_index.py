"""Scores and selection against brute force."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.sparse.codebook import Codes
from headrace.sparse.index import PQIndex, attended, best


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _index(keys: torch.Tensor, codes: Codes, skip: torch.Tensor | None = None) -> PQIndex:
    index = PQIndex(codes)
    index.build(keys, skip)
    return index


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 3), group=st.integers(1, 4), count=st.integers(1, 40), subspaces=st.sampled_from([1, 2, 4]),
    bits=st.integers(1, 5), seed=st.integers(0, 99),
)  # fmt: skip
def test_a_score_is_the_product_with_the_coded_key(
    rows: int, group: int, count: int, subspaces: int, bits: int, seed: int
) -> None:
    keys, queries = _random(rows, count, 8, seed=seed), _random(rows, group, 8, seed=seed + 1)
    index = _index(keys, Codes(subspaces, bits))
    assert index.codebook is not None
    found, codes = index.scores(queries, 0.5), index.table
    for r in range(rows):
        for g in range(group):
            for t in range(count):
                size = 8 // subspaces
                want = sum(
                    float(
                        queries[r, g, m * size : (m + 1) * size] @ index.codebook.centroids[r, m, int(codes[r, m, t])]
                    )
                    for m in range(subspaces)
                )
                assert abs(float(found[r, g, t]) - 0.5 * want) < 1e-4


def test_exact_codes_select_as_exact_keys_do() -> None:
    """Keys made of few codewords: the sketch loses nothing, so its choice is the true one."""
    words, pick = _random(2, 4, 4), torch.randint(0, 4, (2, 100), generator=torch.Generator().manual_seed(5))
    keys = torch.cat([words[0][pick[0]], words[1][pick[1]]], 1)[None]
    queries = _random(1, 3, 8, seed=9)
    index = _index(keys, Codes(2, 2))
    true = queries @ keys.transpose(1, 2) * 0.3
    torch.testing.assert_close(index.scores(queries, 0.3), true, atol=1e-5, rtol=1e-5)
    weights = attended(true)[0]
    chosen = weights[index.select(queries, 17, 0.3)[0]]
    torch.testing.assert_close(chosen, weights.sort(descending=True).values[:17], atol=1e-6, rtol=1e-5)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.integers(0, 40))
def test_the_best_are_the_largest_and_then_the_newest(values: list[int], k: int) -> None:
    expected = sorted(range(len(values)), key=lambda i: (values[i], i), reverse=True)[:k]
    assert best(torch.tensor([values], dtype=torch.float32), k)[0].tolist() == expected


def test_one_loud_head_does_not_decide_alone() -> None:
    """A softmax per head before the sum: with raw sums the second head's favourite would not be among the best two."""
    scores = torch.tensor([[[100.0, 90.0, 0.0], [0.0, 0.0, 5.0]]])
    assert set(best(attended(scores), 2)[0].tolist()) == {0, 2}
    assert set(best(scores.sum(1), 2)[0].tolist()) == {0, 1}


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 60)), max_size=8), st.integers(0, 50))
def test_appending_and_truncating_is_exact(moves: list[tuple[bool, int]], seed: int) -> None:
    keys = _random(2, 600, 8, seed=seed)
    index = _index(keys[:, :20], Codes(2, 3))
    length = 20
    for grow, amount in moves:
        if grow:
            index.append(keys[:, length : length + amount])
            length += amount
        else:
            length = max(0, length - amount)
            index.truncate(length)
    assert index.codebook is not None
    assert index.length == length
    assert torch.equal(index.table, index.codebook.assign(keys[:, :length]))


def test_padding_is_never_selected_before_real_keys() -> None:
    keys = _random(2, 50, 8)
    index = _index(keys, Codes(2, 3), torch.tensor([30, 0]))
    chosen = index.select(_random(2, 2, 8, seed=1), 20, 1.0)
    assert sorted(chosen[0].tolist()) == list(range(30, 50))


def test_rows_can_be_reordered() -> None:
    keys, queries = _random(4, 50, 8), _random(4, 2, 8, seed=1)
    index = _index(keys, Codes(2, 3), torch.tensor([0, 10, 0, 5]))
    before = index.scores(queries, 1.0)
    order = torch.tensor([3, 0, 0, 1])
    index.select_rows(order)
    assert torch.equal(index.scores(queries[order], 1.0), before[order])


def test_bytes_are_what_the_formula_says() -> None:
    index = _index(_random(3, 1000, 16), Codes(4, 8))
    assert index.nbytes == 3 * (1000 * 4 + 256 * 16 * 4)
