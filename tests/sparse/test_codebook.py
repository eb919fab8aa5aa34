"""Clustering and codes."""

from __future__ import annotations

import itertools

import pytest
import torch

from headrace.core.errors import InvalidRequest
from headrace.sparse.codebook import Codebook, Codes, _draw, _sample, _step, fit, split


def _keys(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _inertia(keys: torch.Tensor, book: Codebook) -> float:
    return float((book.decode(book.assign(keys)) - keys).square().sum())


@pytest.mark.parametrize("text", ["2x6", "4x8", "1x12"])
def test_codes_are_named_by_their_size(text: str) -> None:
    assert f"{Codes.parse(text).subspaces}x{Codes.parse(text).bits}" == text


@pytest.mark.parametrize("text", ["", "2", "0x6", "2x0", "2x13", "x", "2x6x1"])
def test_other_codes_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="codes"):
        Codes.parse(text)


def test_a_code_is_the_nearest_centroid() -> None:
    keys = _keys(3, 50, 12)
    book = fit(keys, Codes(3, 3))
    codes = book.assign(keys)
    for row in range(3):
        for run in range(3):
            part = keys[row, :, run * 4 : run * 4 + 4]
            gaps = torch.cdist(part.double(), book.centroids[row, run].double())
            chosen = gaps.gather(1, codes[row, run, :, None].long())[:, 0]
            torch.testing.assert_close(chosen, gaps.min(1).values, atol=1e-6, rtol=1e-5)


def test_more_iterations_never_cluster_worse() -> None:
    keys = _keys(2, 400, 16)
    losses = [_inertia(keys, fit(keys, Codes(2, 4), iterations=count)) for count in range(8)]
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(losses))
    assert losses[-1] < 0.9 * losses[0]


def test_as_good_as_a_plain_lloyd_from_the_same_start() -> None:
    keys = _keys(1, 300, 4)
    weights = torch.ones(1, 300)
    runs, drawn = _sample(keys, Codes(1, 3), torch.zeros(1, dtype=torch.long))
    assert torch.equal(drawn, weights)
    start = _draw(runs, weights, 8, 0)[0, 0].double()
    points = keys[0].double()
    for _ in range(10):
        codes = torch.cdist(points, start).argmin(1)
        start = torch.stack([points[codes == c].mean(0) if (codes == c).any() else start[c] for c in range(8)])
    plain = float(torch.cdist(points, start).min(1).values.square().sum())
    assert _inertia(keys, fit(keys, Codes(1, 3), iterations=10)) <= 1.02 * plain


@pytest.mark.parametrize("count", [1, 3, 16])
def test_as_many_centroids_as_keys_code_exactly(count: int) -> None:
    keys = _keys(2, count, 6)
    book = fit(keys, Codes(1, 4))
    assert torch.equal(book.decode(book.assign(keys)), keys)


def test_equal_keys_and_empty_clusters_are_harmless() -> None:
    keys = torch.ones(2, 40, 8)
    keys[1, 20:] = 2.0
    book = fit(keys, Codes(2, 4), iterations=5)
    assert bool(book.centroids.isfinite().all())
    assert _inertia(keys, book) == 0.0


def test_an_empty_cluster_moves_to_the_worst_key() -> None:
    keys = torch.cat([torch.zeros(1, 20, 2), torch.full((1, 1, 2), 9.0)], 1)
    centroids = torch.tensor([[0.0, 0.0], [100.0, 100.0]]).view(1, 1, 2, 2)
    moved = _step(split(keys, 1), torch.ones(1, 21), centroids)
    assert torch.equal(moved[0, 0, 1], torch.tensor([9.0, 9.0]))


def test_padding_does_not_move_a_centroid() -> None:
    keys = _keys(2, 60, 8)
    skip = torch.tensor([25, 0])
    wild = keys.clone()
    wild[0, :25] = 1e3
    assert torch.equal(fit(keys, Codes(2, 3), skip=skip).centroids, fit(wild, Codes(2, 3), skip=skip).centroids)
    assert not torch.equal(fit(keys, Codes(2, 3)).centroids, fit(wild, Codes(2, 3)).centroids)


def test_what_cannot_be_clustered_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="divide the head size 8"):
        fit(_keys(1, 10, 8), Codes(3, 2))
    with pytest.raises(ValueError, match="at least one key"):
        fit(_keys(2, 10, 8), Codes(2, 2), skip=torch.tensor([0, 10]))


def test_a_long_context_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.sparse.codebook.SAMPLE", 4)
    keys = _keys(1, 501, 4)
    runs, weights = _sample(keys, Codes(1, 3), torch.tensor([100]))
    assert 32 <= runs.shape[2] <= 64
    assert 0 < int((weights == 0).sum()) < runs.shape[2]
    assert _inertia(keys, fit(keys, Codes(1, 3))) < float(keys.square().sum())
