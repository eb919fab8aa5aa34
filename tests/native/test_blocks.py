"""Norm, gate and rotation against float64, and row by row."""

from __future__ import annotations

import math

import pytest
import torch

from headrace.native import blocks, build

pytestmark = pytest.mark.skipif(not build.available(), reason=f"no compiler: {build.why_not()}")


EXACT = {
    "silu": torch.nn.functional.silu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "gelu": torch.nn.functional.gelu,
    "relu": torch.relu,
    "relu_squared": lambda x: torch.relu(x).square(),
}


def _values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("width", [1, 3, 16, 63, 64, 65, 768])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_rms_norm(width: int, size: float) -> None:
    x, scale = _values(2, 3, width) * size, _values(width, seed=1)
    exact = torch.nn.functional.rms_norm(x.double(), (width,), scale.double(), 1e-6)
    torch.testing.assert_close(blocks.rms_norm(x, scale, 1e-6).double(), exact, rtol=2e-6, atol=1e-12)
    transposed = x.transpose(0, 1)
    assert torch.equal(blocks.rms_norm(transposed, scale, 1e-6), blocks.rms_norm(x, scale, 1e-6).transpose(0, 1))


@pytest.mark.parametrize(("groups", "width"), [(1, 48), (4, 12), (3, 16)])
def test_rms_norm_in_place_touches_nothing_else(groups: int, width: int) -> None:
    whole, scale = _values(5, 100), _values(width, seed=1)
    expected = whole.clone()
    part = expected[:, 20 : 20 + groups * width]
    part.copy_(blocks.rms_norm(part.reshape(5, groups, width), scale, 1e-5).reshape(5, -1))
    blocks.rms_norm_(whole[:, 20 : 20 + groups * width], scale, 1e-5)
    torch.testing.assert_close(whole, expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(whole[:, :20], expected[:, :20])
    assert torch.equal(whole[:, 20 + groups * width :], expected[:, 20 + groups * width :])


@pytest.mark.parametrize("width", [1, 7, 64, 100])
@pytest.mark.parametrize("activation", list(blocks.ACTIVATIONS))
def test_gate(width: int, activation: blocks.Activation) -> None:
    x = _values(6, 2 * width) * 5
    x[0, 0], x[1, 0], x[2, 0], x[3, 0] = 0.0, 100.0, -100.0, -30.0
    gates, ups = x.double()[:, :width], x.double()[:, width:]
    torch.testing.assert_close(
        blocks.gate(x, activation).double(), EXACT[activation](gates) * ups, rtol=2e-5, atol=5e-6
    )
    alone = blocks.gate(x, activation, gated=False).double()
    torch.testing.assert_close(alone, EXACT[activation](x.double()), rtol=2e-5, atol=5e-6)


def test_gate_follows_the_exponential_closely() -> None:
    gates = torch.linspace(-80, 80, 100_001)
    x = torch.stack([gates, torch.ones_like(gates)], dim=1)
    exact = gates.double() * torch.sigmoid(gates.double())
    error = (blocks.gate(x, "silu")[:, 0].double() - exact).abs() / exact.abs().clamp_min(1e-30)
    assert error.max() < 1e-6


@pytest.mark.parametrize("activation", list(blocks.ACTIVATIONS))
def test_gate_passes_on_what_is_no_number(activation: blocks.Activation) -> None:
    x = torch.tensor([[math.nan, 1.0], [math.inf, 1.0], [1.0, math.nan]])
    y = blocks.gate(x, activation)[:, 0]
    assert torch.equal(y.isnan(), torch.tensor([True, False, True]))
    assert y[1] == math.inf


@pytest.mark.parametrize(("size", "turned"), [(16, 16), (64, 32), (6, 4)])
def test_rotate_interleaved(size: int, turned: int) -> None:
    x, angles = _values(5, 3 * size), _values(5, turned // 2, seed=1)
    pairs = torch.view_as_complex(x.view(5, 3, size)[..., :turned].reshape(5, 3, -1, 2).double())
    exact = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(-2)
    rest = x.view(5, 3, size)[..., turned:].clone()
    blocks.rotate_(x, size, angles.cos().repeat(1, 2), angles.sin().repeat(1, 2), interleaved=True)
    torch.testing.assert_close(x.view(5, 3, size)[..., :turned].double(), exact, rtol=1e-5, atol=1e-6)
    assert torch.equal(x.view(5, 3, size)[..., turned:], rest)


@pytest.mark.parametrize(("size", "turned"), [(16, 16), (64, 64), (64, 32), (6, 4)])
def test_rotate(size: int, turned: int) -> None:
    heads, rows = 3, 5
    whole = _values(rows, heads * size + 8)
    angles = _values(rows, turned, seed=1)
    x = whole[:, : heads * size].reshape(rows, heads, size).double()
    head, rest = x[..., :turned], x[..., turned:]
    half = turned // 2
    swapped = torch.cat((-head[..., half:], head[..., :half]), dim=-1)
    exact = torch.cat((head * angles.cos().double()[:, None] + swapped * angles.sin().double()[:, None], rest), dim=-1)
    tail = whole[:, heads * size :].clone()
    blocks.rotate_(whole[:, : heads * size], size, angles.cos(), angles.sin())
    torch.testing.assert_close(whole[:, : heads * size].double(), exact.reshape(rows, -1), rtol=1e-5, atol=1e-6)
    assert torch.equal(whole[:, heads * size :], tail)


def test_rows_do_not_depend_on_their_batch() -> None:
    x, scale, angles = _values(700, 96), _values(96, seed=1), _values(700, 16, seed=2)
    turned = x.clone()
    blocks.rotate_(turned, 16, angles.cos(), angles.sin())
    normed, gated = blocks.rms_norm(x, scale, 1e-6), blocks.gate(x, "silu")
    for row in (0, 1, 350, 699):
        one = x[row : row + 1].clone()
        assert torch.equal(blocks.rms_norm(one, scale, 1e-6), normed[row : row + 1])
        assert torch.equal(blocks.gate(one, "silu"), gated[row : row + 1])
        blocks.rotate_(one, 16, angles[row : row + 1].cos(), angles[row : row + 1].sin())
        assert torch.equal(one, turned[row : row + 1])


def test_no_rows() -> None:
    assert blocks.rms_norm(torch.empty(0, 8), torch.ones(8), 1e-6).shape == (0, 8)
    assert blocks.gate(torch.empty(0, 8), "silu").shape == (0, 4)
