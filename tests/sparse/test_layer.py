"""The hand-over of tokens from the local window to the index, rollback, refresh, and the estimate of the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.native.build import available
from headrace.sparse.attend import attend_rows
from headrace.sparse.codebook import Codes
from headrace.sparse.layer import PQLayer, PQSettings
from headrace.sparse.native import NativeIndex
from headrace.sparse.regions import Regions

SETTINGS = PQSettings(Regions(0.2, initial=4), Codes(2, 3), crossover=0)
B, H, G, D = 2, 2, 3, 8


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _prompted(
    length: int, settings: PQSettings = SETTINGS, seed: int = 0
) -> tuple[PQLayer, torch.Tensor, torch.Tensor]:
    keys, values = _random(B, H, 600, D, seed=seed), _random(B, H, 600, D, seed=seed + 1)
    layer = PQLayer(settings)
    layer.update(keys[:, :, :length], values[:, :, :length])
    return layer, keys, values


def _step(layer: PQLayer, keys: torch.Tensor, values: torch.Tensor, seed: int = 7) -> torch.Tensor:
    at = layer.length
    layer.update(keys[:, :, at : at + 1], values[:, :, at : at + 1])
    return layer.attend(_random(B, H * G, 1, D, seed=seed + at), D**-0.5)


def test_every_token_is_handed_over_once_and_coded_as_itself() -> None:
    layer, keys, values = _prompted(200)
    _step(layer, keys, values)
    local = layer.window.local
    assert local > 10
    for _ in range(3 * local):
        _step(layer, keys, values)
        index, length = layer.index, layer.length
        assert index is not None
        assert index.codebook is not None
        assert torch.equal(layer.keys[:, :, :length], keys[:, :, :length])
        assert torch.equal(layer.values[:, :, :length], values[:, :, :length])
        assert index.length == length - 4 - local
        middle = keys[:, :, 4 : length - local].flatten(0, 1)
        assert torch.equal(index.table, index.codebook.assign(middle))


FAULTS: dict[str, Callable[[torch.Tensor, int, int, int], torch.Tensor]] = {
    "stale rows": lambda keys, first, last, length: torch.zeros_like(keys[:, :, first:last]),
    "newest instead of evicted": lambda keys, first, last, length: keys[:, :, length - 1 : length].expand(
        -1, -1, last - first, -1
    ),
    "one slot further": lambda keys, first, last, length: keys[:, :, first + 1 : last + 1],
}


@pytest.mark.parametrize("fault", [None, *FAULTS])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_wrong_hand_over_is_noticed(fault: str | None, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the ways a known implementation gets this wrong fail the comparison above, and nothing else does."""
    layer, keys, values = _prompted(200, replace(SETTINGS, compiled=compiled))
    _step(layer, keys, values)
    index, catch_up = layer.index, layer._catch_up
    assert index is not None
    assert not compiled or isinstance(index, NativeIndex) or not available()

    def wrong(own: torch.Tensor, first: int, last: int, skip: torch.Tensor | None) -> None:
        if fault is not None:
            index.append(FAULTS[fault](keys, first + index.length, last, layer.length).flatten(0, 1))
        catch_up(own, first, last, skip)

    monkeypatch.setattr(layer, "_catch_up", wrong)
    for _ in range(20):
        _step(layer, keys, values)
    assert index.codebook is not None
    first, last = layer.window.middle(layer.length)
    right = torch.equal(index.table, index.codebook.assign(keys[:, :, first:last].flatten(0, 1)))
    assert right is (fault is None)


def test_two_requests_share_nothing() -> None:
    layer, keys, values = _prompted(300, seed=5)
    _step(layer, keys, values)
    layer.reset()
    fresh, keys, values = _prompted(150, seed=11)
    layer.update(keys[:, :, :150], values[:, :, :150])
    for _ in range(40):
        assert torch.equal(_step(layer, keys, values), _step(fresh, keys, values))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=5))
def test_rollback_leaves_no_trace(drafts: list[int]) -> None:
    layer, keys, values = _prompted(200)
    twin, _, _ = _prompted(200)
    _step(layer, keys, values)
    _step(twin, keys, values)
    junk = _random(B, H, 30, D, seed=99)
    for count in drafts:
        layer.update(junk[:, :, :count], junk[:, :, :count])
        layer.crop(-count)
        for _ in range(3):
            assert torch.equal(_step(layer, keys, values), _step(twin, keys, values))
    assert layer.index is not None
    assert twin.index is not None
    assert torch.equal(layer.index.table, twin.index.table)


def test_rollback_below_the_middle() -> None:
    layer, keys, values = _prompted(200, PQSettings(Regions(0.2, initial=4), Codes(2, 3), residual=True, crossover=0))
    for _ in range(50):
        _step(layer, keys, values)
    layer.crop(-60)
    assert layer.index is not None
    for _ in range(30):
        out = _step(layer, keys, values)
        first, last = layer.window.middle(layer.length)
        assert layer.index.length == last - first
        assert bool(out.isfinite().all())
    middle = values[:, :, first:last].flatten(0, 1)
    torch.testing.assert_close(layer._mean_value(middle, None), middle.mean(1), atol=1e-5, rtol=1e-5)


def test_a_long_answer_refreshes_the_codebook() -> None:
    """Keys that drift away: a codebook fitted on the prompt fits them ever worse, a refreshed one does not."""
    losses = {}
    for refresh in (None, 0.5):
        layer, keys, values = _prompted(
            200, PQSettings(Regions(0.2, initial=4), Codes(2, 3), refresh=refresh, crossover=0)
        )
        keys[:, :, 200:] += 6.0
        for _ in range(390):
            _step(layer, keys, values)
        assert layer.index is not None
        assert layer.index.codebook is not None
        first, last = layer.window.middle(layer.length)
        middle = keys[:, :, first:last].flatten(0, 1)
        losses[refresh] = float((layer.index.codebook.decode(layer.index.table) - middle).square().mean())
    assert losses[0.5] < 0.7 * losses[None]


def _dense(layer: PQLayer, keys: torch.Tensor, values: torch.Tensor, seed: int) -> torch.Tensor:
    query = _random(B, H * G, 1, D, seed=seed).view(B * H, G, D)
    index = torch.arange(layer.length).expand(B * H, -1)
    rows = (part[:, :, : layer.length].flatten(0, 1) for part in (keys, values))
    return attend_rows(query, *rows, index, None, D**-0.5)[0].view(B, H * G, 1, D)


def test_the_estimated_rest_mends_diffuse_attention() -> None:
    errors = {}
    for residual in (False, True):
        layer, keys, values = _prompted(
            400, PQSettings(Regions(0.1, initial=4), Codes(2, 4), residual=residual, crossover=0)
        )
        found = _step(layer, keys, values)
        errors[residual] = float((found - _dense(layer, keys, values, 7 + 400)).norm())
    assert errors[True] < 0.7 * errors[False]


def test_short_contexts_stay_dense() -> None:
    layer, keys, values = _prompted(200, PQSettings(Regions(0.1, initial=4), Codes(2, 3), crossover=300))
    found = _step(layer, keys, values)
    assert layer.index is None
    torch.testing.assert_close(found, _dense(layer, keys, values, 7 + 200), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_rows_beyond_the_device_are_fetched(compiled: bool, residual: bool) -> None:
    """The same answers from host memory, while the device holds the sketch alone and a step fetches what it reads."""
    bound = 2 * B * H * D * 4 * 220  # the prompt fits, its answer does not
    plain = replace(SETTINGS, compiled=compiled, residual=residual)
    layer, keys, values = _prompted(210, plain)
    bounded, _, _ = _prompted(210, replace(plain, device_bytes=bound))
    assert not bounded.hosted
    for _ in range(40):
        torch.testing.assert_close(_step(bounded, keys, values), _step(layer, keys, values), atol=1e-6, rtol=1e-5)
    assert bounded.hosted
    assert bounded.device_bytes <= bound < layer.device_bytes
    if not compiled:
        assert bounded.fetched == 2 * B * H * D * 4 * (bounded.window.attended)
    bounded.crop(-30)
    layer.crop(-30)
    several = [part.update(keys[:, :, 300:303], values[:, :, 300:303]) for part in (bounded, layer)]
    assert torch.equal(several[0][0], several[1][0])
    torch.testing.assert_close(_step(bounded, keys, values), _step(layer, keys, values), atol=1e-6, rtol=1e-5)
