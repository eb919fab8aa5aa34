"""Every selector against a literal reading of its definition, one row at a time in plain loops."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from headrace.core.errors import InvalidRequest
from headrace.sparse.regions import Regions
from headrace.sparse.selectors import SELECTORS, Place, SelectedAttention, make
from headrace.sparse.selectors.base import take_blocks

ROWS, GROUP, LENGTH, SIZE, SCALE = 3, 2, 300, 16, 0.25
FIRST, LAST, COUNT = 8, 260, 40


def _context(length: int = LENGTH, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries [R, G, L, D], keys and values [R, L, D]; the query of the last token is sharp on a few keys."""
    drawn = torch.Generator().manual_seed(seed)
    queries = 2.0 * torch.randn(ROWS, GROUP, length, SIZE, generator=drawn)
    keys = torch.randn(ROWS, length, SIZE, generator=drawn)
    return queries, keys, torch.randn(ROWS, length, SIZE, generator=drawn)


def _selected(name: str, **options: object) -> list[set[int]]:
    queries, keys, _ = _context()
    selector = make(name, **options)
    selector.read(queries[:, :, :-1], keys[:, :-1], SCALE)
    chosen = selector.select(queries[:, :, -1], keys, FIRST, LAST, COUNT, SCALE)
    return [set(row) for row in chosen.tolist()]


def _top(scores: dict[int, float], count: int) -> set[int]:
    return set(sorted(scores, key=lambda token: (scores[token], token), reverse=True)[:count])


def _group_sum(scores: torch.Tensor) -> dict[int, float]:
    """[G, middle] scores to the attention of each token: a softmax per head, then the sum."""
    return {FIRST + i: weight for i, weight in enumerate(scores.softmax(-1).sum(0).tolist())}


def test_oracle_takes_the_most_attended() -> None:
    queries, keys, _ = _context()
    for row, found in enumerate(_selected("oracle")):
        assert found == _top(_group_sum(queries[row, :, -1] @ keys[row, FIRST:LAST].T * SCALE), COUNT)


def test_a_sum_of_raw_scores_would_choose_otherwise() -> None:
    """Negative control: without the softmax per head a head with a large norm decides alone."""
    queries, keys, _ = _context()
    raw = (queries[0, :, -1] * torch.tensor([[5.0], [1.0]])) @ keys[0, FIRST:LAST].T * SCALE
    summed = {FIRST + i: score for i, score in enumerate(raw.sum(0).tolist())}
    assert _top(summed, COUNT) != _top(_group_sum(raw), COUNT)


def test_streaming_takes_the_newest() -> None:
    assert _selected("streaming") == [set(range(LAST - COUNT, LAST))] * ROWS


def test_h2o_takes_the_columns_with_the_largest_sums() -> None:
    queries, keys, _ = _context()
    for row, found in enumerate(_selected("h2o")):
        sums = dict.fromkeys(range(LENGTH), 0.0)
        for head in range(GROUP):
            for place in range(LENGTH - 1):
                weights = (queries[row, head, place] @ keys[row, : place + 1].T * SCALE).softmax(-1)
                for token, weight in enumerate(weights.tolist()):
                    sums[token] += weight
        assert found == _top({token: sums[token] for token in range(FIRST, LAST)}, COUNT)


def test_h2o_never_takes_back_what_it_evicted() -> None:
    queries, keys, values = _context()
    attention = SelectedAttention(make("h2o"), Regions(0.2, initial=4))
    attention.read(queries[:, :, :200], keys[:, :200], SCALE)
    gone: list[set[int]] = [set() for _ in range(ROWS)]
    for length in range(201, LENGTH):
        index = attention.step(queries[:, :, length - 1], keys[:, :length], values[:, :length], SCALE).tokens
        for row, found in enumerate(index.tolist()):
            assert not gone[row] & set(found)
            gone[row] |= set(range(length)) - set(found)
    assert all(gone)


def test_h2o_adds_what_a_step_gives() -> None:
    queries, keys, _ = _context()
    selector = make("h2o")
    selector.read(queries[:, :, :-1], keys[:, :-1], SCALE)
    loser = ({*range(FIRST, LAST)} - _selected("h2o")[0]).pop()
    selector.observe(torch.full((ROWS, 1), loser), torch.full((ROWS, GROUP, 1), 1e3))
    assert loser in selector.select(queries[:, :, -1], keys, FIRST, LAST, COUNT, SCALE)[0].tolist()


def _snap(row: int, window: int = 32, kernel: int = 5) -> dict[int, float]:
    queries, keys, _ = _context()
    end = LENGTH - 1
    total = [0.0] * end
    for head in range(GROUP):
        mean = [0.0] * end
        for place in range(end - window, end):
            weights = (queries[row, head, place] @ keys[row, : place + 1].T * SCALE).softmax(-1).tolist()
            for token, weight in enumerate(weights):
                mean[token] += weight / window
        half = kernel // 2
        for token in range(end):
            total[token] += sum(mean[max(0, token - half) : token + half + 1]) / kernel
    return {token: total[token] for token in range(FIRST, LAST)}


def test_snapkv_takes_what_the_last_queries_attended_to() -> None:
    for row, found in enumerate(_selected("snapkv")):
        assert found == _top(_snap(row), COUNT)


def test_snapkv_reads_the_same_in_chunks() -> None:
    queries, keys, _ = _context()
    selector = make("snapkv")
    for start, end in ((0, 270), (270, 290), (290, LENGTH - 1)):
        selector.read(queries[:, :, start:end], keys[:, :end], SCALE)
    chosen = selector.select(queries[:, :, -1], keys, FIRST, LAST, COUNT, SCALE)
    assert [set(row) for row in chosen.tolist()] == _selected("snapkv")


def test_snapkv_keeps_its_choice_and_grows_by_the_newest() -> None:
    queries, keys, _ = _context()
    selector = make("snapkv")
    selector.read(queries[:, :, :-1], keys[:, :-1], SCALE)
    before = selector.select(queries[:, :, -1], keys, FIRST, LAST, COUNT, SCALE)
    after = selector.select(queries[:, :, 0], keys, FIRST, LAST + 4, COUNT + 3, SCALE)
    for old, new in zip(before.tolist(), after.tolist(), strict=True):
        extra = [token for token in range(LAST + 3, FIRST, -1) if token not in old][:3]
        assert set(new) == {*old, *extra}


def test_pyramidkv_falls_linearly_with_the_same_mean() -> None:
    shares = [make("pyramidkv", Place(layer, 5)).share(1000) for layer in range(5)]
    steps = {high - low for high, low in itertools.pairwise(shares)}
    assert max(steps) - min(steps) <= 1
    assert sum(shares) == pytest.approx(5000, abs=3)
    assert shares[0] / shares[-1] == pytest.approx(20, rel=0.01)


@pytest.mark.parametrize("dimensions", [1, 4, SIZE])
def test_sparq_scores_by_the_largest_dimensions(dimensions: int) -> None:
    queries, keys, _ = _context()
    for row, found in enumerate(_selected("sparq", dimensions=dimensions)):
        last = queries[row, :, -1]
        sizes = last.abs().sum(0).tolist()
        kept = sorted(range(SIZE), key=lambda place: sizes[place], reverse=True)[:dimensions]
        scores = []
        for head in last:
            share = head[kept].abs().sum() / head.abs().sum()
            scores.append(head[kept] @ keys[row, FIRST:LAST][:, kept].T * SCALE / math.sqrt(share))
        assert found == _top(_group_sum(torch.stack(scores)), COUNT)


def test_sparq_of_all_dimensions_is_the_oracle() -> None:
    assert _selected("sparq", dimensions=SIZE) == _selected("oracle")


def test_quest_bounds_pages_from_above_and_takes_the_highest() -> None:
    queries, keys, _ = _context()
    page = 16
    for row, found in enumerate(_selected("quest", page=page)):
        pages = [list(range(at, min(at + page, LAST))) for at in range(FIRST, LAST, page)]
        bounds = torch.tensor(
            [
                [
                    sum(
                        max(q * low, q * high)
                        for q, low, high in zip(head, keys[row, at].amin(0), keys[row, at].amax(0), strict=True)
                    )
                    for at in pages
                ]
                for head in queries[row, :, -1]
            ]
        )
        for number, at in enumerate(pages):
            assert (queries[row, :, -1] @ keys[row, at].T).amax(1).le(bounds[:, number] + 1e-4).all()
        weights = (bounds * SCALE).softmax(-1).sum(0).tolist()
        order = sorted(range(len(pages)), key=lambda number: (weights[number], number), reverse=True)
        expected = [token for number in order for token in reversed(pages[number])][:COUNT]
        assert found == set(expected)


def test_quest_keeps_up_with_a_growing_context() -> None:
    queries, keys, _ = _context()
    selector = make("quest")
    for last in range(200, LAST + 1):
        found = selector.select(queries[:, :, -1], keys, FIRST, last, COUNT, SCALE)
        fresh = make("quest").select(queries[:, :, -1], keys, FIRST, last, COUNT, SCALE)
        assert torch.equal(found, fresh)


def test_infllm_takes_blocks_by_the_tokens_asked_for() -> None:
    queries, keys, _ = _context()
    block, representatives, window = 32, 2, 20
    options = {"block": block, "representatives": representatives, "window": window}
    for row, found in enumerate(_selected("infllm", **options)):
        blocks = [list(range(at, min(at + block, LAST))) for at in range(FIRST, LAST, block)]
        scores = []
        for tokens in blocks:
            asked = {}
            for token in tokens:
                after = queries[row, :, token + 1 : token + 1 + window].sum(0)
                asked[token] = float((after @ keys[row, token]).mean())
            chosen = sorted(tokens, key=lambda token: asked[token], reverse=True)[:representatives]
            scores.append(float((queries[row, :, -1] @ keys[row, chosen].sum(0)).mean()))
        order = sorted(range(len(blocks)), key=lambda number: scores[number], reverse=True)
        assert found == set([token for number in order for token in reversed(blocks[number])][:COUNT])


def test_pq_with_a_centroid_per_key_is_the_oracle() -> None:
    queries, keys, _ = _context()
    few = keys[:, torch.arange(LENGTH) % 8]
    expected = make("oracle").select(queries[:, :, -1], few, FIRST, LAST, COUNT, SCALE)
    found = make("pq", codes="1x4", iterations=20).select(queries[:, :, -1], few, FIRST, LAST, COUNT, SCALE)
    scores = [(queries[:, :, -1] @ few.transpose(1, 2) * SCALE)[:, :, FIRST:LAST].softmax(-1).sum(1)] * 2
    both = [part.gather(1, index - FIRST).sort(1).values for part, index in zip(scores, (expected, found), strict=True)]
    assert torch.allclose(*both, atol=1e-6)


def test_blocks_are_cut_at_their_oldest_token() -> None:
    order = torch.tensor([[2, 0, 1], [1, 2, 0]])
    assert take_blocks(order, 4, 10, 5).tolist() == [[9, 8, 3, 2, 1], [7, 6, 5, 4, 9]]


@pytest.mark.parametrize("name", sorted(SELECTORS))
def test_every_selector_reads_the_same_number_of_tokens(name: str) -> None:
    """What comparisons rest on: budgets agree at every step, nothing is named twice, and the window is always there."""
    if name == "full":
        return
    queries, keys, values = _context()
    regions = Regions(0.2, initial=4)
    attention = SelectedAttention(make(name), regions)
    attention.read(queries[:, :, :200], keys[:, :200], SCALE)
    for length in range(201, LENGTH):
        found = attention.step(queries[:, :, length - 1], keys[:, :length], values[:, :length], SCALE)
        window = regions.window(200, length)
        for row in found.tokens.tolist():
            assert len(row) == len(set(row)) == window.attended
            assert {*range(4), *range(length - window.local, length)} <= set(row)
        assert found.weights.sum(-1).allclose(torch.ones(ROWS, GROUP))


def test_full_is_dense_attention() -> None:
    queries, keys, values = _context()
    found = SelectedAttention(make("full"), Regions(0.1)).step(queries[:, :, -1], keys, values, SCALE)
    expected = (queries[:, :, -1] @ keys.transpose(1, 2) * SCALE).softmax(-1) @ values
    assert torch.allclose(found.output, expected, atol=1e-5)


def test_unknown_names_and_options_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="oracle"):
        make("best")
    with pytest.raises(InvalidRequest, match="pages"):
        make("quest", pages=3)
