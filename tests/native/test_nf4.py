"""nf4 products: the published levels, block scales, fp32 sums; every instruction set, any batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.native.numbers import error, values
from torch import Tensor

from headrace.native import build
from headrace.native.skinny import PackedMatrix

pytestmark = pytest.mark.skipif(not build.available(), reason=f"no compiler: {build.why_not()}")

# Below, at and beyond panels (32, 16, 8 columns), words (8) and blocks (64) of K.
SHAPES = [(1, 1), (5, 3), (31, 17), (32, 64), (33, 63), (64, 65), (70, 256), (97, 135)]
ROWS = [1, 2, 3, 4, 5, 7, 11, 12, 13, 24, 25, 64, 130]

# QLoRA's levels as bitsandbytes writes them.
LEVELS = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)


def _rounded(weight: Tensor) -> Tensor:
    """What a weight becomes: block by block, the nearest level times the largest magnitude as bfloat16."""
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % 64)).view(len(weight), -1, 64)
    scales = padded.abs().amax(-1, keepdim=True).bfloat16().float()
    levels = torch.bucketize(padded / scales.clamp_min(1e-38), (LEVELS[1:] + LEVELS[:-1]) * 0.5)
    return (LEVELS[levels] * scales).view(len(weight), -1)[:, : weight.shape[1]]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weights_are_the_nearest_levels(isa: str, shape: tuple[int, int]) -> None:
    weight = values(*shape, seed=1)
    weight[0] = 0.0
    found = PackedMatrix(weight, storage="nf4")
    assert found.storage == "nf4"
    assert torch.equal(found.unpack(), _rounded(weight))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product_is_that_of_the_rounded_weights(isa: str, shape: tuple[int, int]) -> None:
    weight, bias = values(*shape, seed=2), values(shape[0], seed=3)
    matrix, with_bias = PackedMatrix(weight, storage="nf4"), PackedMatrix(weight, bias, "nf4")
    for rows in ROWS:
        x = values(rows, shape[1], seed=rows)
        y = matrix.matmul(x)
        assert error(y, x, _rounded(weight)) < 2e-6
        assert torch.allclose(with_bias.matmul(x), y + bias, rtol=1e-5, atol=1e-5)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 140), st.integers(1, 300), st.integers(1, 40), st.integers(-9, 9), st.integers(0, 9))
def test_any_size(isa: str, columns: int, depth: int, rows: int, exponent: int, seed: int) -> None:
    weight, x = values(columns, depth, seed=seed) * 10.0**exponent, values(rows, depth, seed=seed + 1)
    matrix = PackedMatrix(weight, storage="nf4")
    assert torch.equal(matrix.unpack(), _rounded(weight))
    assert error(matrix.matmul(x), x, matrix.unpack()) < 2e-6


def test_a_wrong_weight_is_noticed(isa: str) -> None:
    weight, x = values(33, 65, seed=1), values(4, 65, seed=2)
    y = PackedMatrix(weight, storage="nf4").matmul(x)
    rounded = _rounded(weight)
    rounded[32, 60] += 0.1 * rounded[32].abs().max()
    assert error(y, x, rounded) > 1e-4


@pytest.mark.parametrize("shape", [(33, 255), (97, 130), (256, 768)], ids=str)
def test_rows_do_not_depend_on_their_batch(isa: str, shape: tuple[int, int]) -> None:
    matrix = PackedMatrix(values(*shape, seed=3), values(shape[0], seed=4), "nf4")
    x = values(150, shape[1], seed=5)
    alone = torch.cat([matrix.matmul(x[row : row + 1]) for row in range(len(x))])
    for rows in (*range(2, 40), 64, 128, 129, 150):
        assert torch.equal(matrix.matmul(x[:rows]), alone[:rows]), rows


def test_threads_do_not_change_bits(isa: str) -> None:
    matrix, x = PackedMatrix(values(200, 300, seed=8), storage="nf4"), values(13, 300, seed=9)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(matrix.matmul(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_rows_that_are_not_finite_stay_alone(isa: str) -> None:
    matrix, x = PackedMatrix(values(40, 70, seed=12), storage="nf4"), values(20, 70, seed=13)
    clean = matrix.matmul(x)
    x[3, 5], x[17, 69] = torch.nan, torch.inf
    y = matrix.matmul(x)
    assert y[3].isnan().all()
    assert not y[17].isfinite().any()
    others = [row for row in range(20) if row not in (3, 17)]
    assert torch.equal(y[others], clean[others])


def test_inputs_may_be_strided_empty_or_transposed() -> None:
    matrix, wide = PackedMatrix(values(40, 24, seed=14), storage="nf4"), values(19, 80, seed=15)
    assert torch.equal(matrix.matmul(wide[:, 8:32]), matrix.matmul(wide[:, 8:32].contiguous()))
    assert torch.equal(matrix.matmul(wide[::2, 8:32]), matrix.matmul(wide[::2, 8:32].contiguous()))
    tall = values(24, 5, seed=16)
    assert torch.equal(matrix.matmul(tall.T), matrix.matmul(tall.T.contiguous()))
    assert matrix.matmul(wide[:0, :24]).shape == (0, 40)


def test_it_takes_an_eighth_of_the_memory() -> None:
    weight = values(256, 1024, seed=17)
    assert PackedMatrix(weight, storage="nf4").nbytes < 0.14 * weight.nbytes


def test_weights_that_are_not_finite_are_refused() -> None:
    weight = torch.zeros(2, 3)
    weight[1, 1] = torch.inf
    with pytest.raises(ValueError, match="finite"):
        PackedMatrix(weight, storage="nf4")


def test_weights_equal_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = values(64, 256, seed=18).clamp(-1, 1)
    weight[:, ::64] = 1.0  # scales that bfloat16 holds exactly
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert torch.equal(PackedMatrix(weight, storage="nf4").unpack(), functional.dequantize_4bit(packed, state))
