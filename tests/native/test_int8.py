"""int8 products against integers in numpy, bit by bit: every instruction set, dot products and matrix tiles, any batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.native.numbers import values
from torch import Tensor

from headrace.native import build, skinny
from headrace.native.skinny import MAX_INT8_DEPTH, PackedMatrix, quantise_rows

pytestmark = pytest.mark.skipif(not build.available(), reason=f"no compiler: {build.why_not()}")

# Below, at and beyond panels (32, 16, 8 columns), row tiles (4, 12, 16, 32), steps of K (4, 64) and blocks of rows (256).
SHAPES = [(1, 1), (5, 3), (31, 17), (32, 64), (33, 63), (64, 65), (70, 256), (97, 130)]
ROWS = [1, 2, 3, 4, 5, 7, 8, 12, 13, 15, 16, 17, 24, 31, 32, 33, 40, 63, 64, 65, 255, 256, 257, 290]


def _expected(matrix: PackedMatrix, x: Tensor) -> Tensor:
    """The product without bias: an integer sum, rounded to float32, times the product of both scales."""
    levels, scales = quantise_rows(x)
    activations = levels[:, : matrix.depth].numpy().astype(np.int64) - 128
    column_scales = matrix.scales.numpy()
    weights = np.rint(matrix.unpack().numpy() / np.where(column_scales == 0, 1, column_scales)[:, None]).astype(
        np.int64
    )
    assert np.abs(weights).max() <= 127
    sums = activations @ weights.T
    return torch.from_numpy(sums.astype(np.float32) * (column_scales[None, :] * scales.numpy()[:, None]))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product_has_the_bits_of_integer_arithmetic(isa: str, shape: tuple[int, int]) -> None:
    matrix = PackedMatrix(values(*shape, seed=1), storage="int8")
    assert matrix.storage == "int8"
    for rows in ROWS:
        x = values(rows, shape[1], seed=rows)
        assert torch.equal(matrix.matmul(x), _expected(matrix, x)), rows


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 140), st.integers(1, 300), st.integers(1, 70), st.floats(-3, 3), st.integers(0, 9))
def test_any_size(isa: str, columns: int, depth: int, rows: int, exponent: float, seed: int) -> None:
    matrix = PackedMatrix(values(columns, depth, seed=seed), storage="int8")
    x = values(rows, depth, seed=seed + 1) * 10**exponent
    assert torch.equal(matrix.matmul(x), _expected(matrix, x))


def test_a_wrong_weight_is_noticed(isa: str) -> None:
    weight, x = values(33, 65, seed=1), values(20, 65, seed=2)
    matrix = PackedMatrix(weight, storage="int8")
    expected = _expected(matrix, x)
    weight[32, 64] += 2 * float(matrix.scales[32])
    assert not torch.equal(PackedMatrix(weight, storage="int8").matmul(x)[:, 32], expected[:, 32])


def test_bias_is_added(isa: str) -> None:
    weight, bias, x = values(37, 70, seed=1), values(37, seed=2), values(35, 70, seed=3)
    with_bias = PackedMatrix(weight, bias, "int8").matmul(x)
    assert torch.allclose(with_bias, PackedMatrix(weight, storage="int8").matmul(x) + bias, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(33, 255), (97, 130), (256, 768)], ids=str)
def test_rows_do_not_depend_on_their_batch(isa: str, shape: tuple[int, int]) -> None:
    matrix = PackedMatrix(values(*shape, seed=3), values(shape[0], seed=4), "int8")
    x = values(300, shape[1], seed=5)
    alone = torch.cat([matrix.matmul(x[row : row + 1]) for row in range(len(x))])
    for rows in (*range(2, 70), 128, 257, 300):
        assert torch.equal(matrix.matmul(x[:rows]), alone[:rows]), rows


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tiles_and_dot_products_give_the_same_bits(shape: tuple[int, int]) -> None:
    if not skinny.has_tiles():
        pytest.skip("this processor has no matrix tiles")
    library = skinny._library()
    matrix = PackedMatrix(values(*shape, seed=6), values(shape[0], seed=7), "int8")
    for rows in ROWS:
        levels, scales = quantise_rows(values(rows, shape[1], seed=rows))
        found = [torch.full((rows, shape[0]), torch.nan) for _ in range(2)]
        for tiles, y in enumerate(found):
            library.headrace_int8_matmul(
                matrix.address, levels.data_ptr(), scales.data_ptr(), rows, y.data_ptr(), tiles
            )
        assert torch.equal(found[0], found[1]), rows


def test_threads_do_not_change_bits(isa: str) -> None:
    matrix, x = PackedMatrix(values(200, 300, seed=8), storage="int8"), values(45, 300, seed=9)
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


def test_rounding_is_to_the_nearest_level(isa: str) -> None:
    x = values(9, 100, seed=10) * torch.logspace(-20, 20, 9)[:, None]
    levels, scales = quantise_rows(x)
    assert levels.shape == (9, 128)
    assert (levels[:, 100:] == 128).all()
    assert torch.equal(scales, x.abs().amax(1) / 127)
    back = (levels[:, :100].float() - 128) * scales[:, None]
    assert ((back - x).abs() <= 0.5001 * scales[:, None]).all()
    assert (levels[:, :100].float() - 128).abs().amax(1).tolist() == [127.0] * 9


def test_weights_are_rounded_to_near_levels() -> None:
    weight = values(40, 500, seed=11)
    weight[3] = 0
    matrix = PackedMatrix(weight, storage="int8")
    assert matrix.nbytes < 0.36 * PackedMatrix(weight, storage="float32").nbytes
    level = weight.abs().amax(1, keepdim=True) / 127
    error = (matrix.unpack() - weight) / level.clamp_min(1e-30)
    assert error.abs().max() < 1.0
    assert error.square().mean() <= 1.001 / 12  # of a uniform error within half a level
    assert not matrix.unpack()[3].any()


def test_rows_that_are_not_finite_stay_alone(isa: str) -> None:
    matrix, x = PackedMatrix(values(40, 70, seed=12), storage="int8"), values(40, 70, seed=13)
    clean = matrix.matmul(x)
    x[3, 5], x[17, 0], x[33, 69] = torch.nan, torch.inf, -torch.inf
    x[20] = 0.0
    for rows in (4, 18, 40):
        y = matrix.matmul(x[:rows])
        for row in range(rows):
            if row in (3, 17, 33):
                assert y[row].isnan().all()
            elif row == 20:
                assert not y[row].any()
            else:
                assert torch.equal(y[row], clean[row])


def test_inputs_may_be_strided_empty_or_transposed() -> None:
    matrix, wide = PackedMatrix(values(40, 24, seed=14), storage="int8"), values(19, 80, seed=15)
    assert torch.equal(matrix.matmul(wide[:, 8:32]), matrix.matmul(wide[:, 8:32].contiguous()))
    assert torch.equal(matrix.matmul(wide[::2, 8:32]), matrix.matmul(wide[::2, 8:32].contiguous()))
    tall = values(24, 5, seed=16)
    assert torch.equal(matrix.matmul(tall.T), matrix.matmul(tall.T.contiguous()))
    assert matrix.matmul(wide[:0, :24]).shape == (0, 40)


def test_weights_it_cannot_hold_are_refused() -> None:
    weight = torch.zeros(2, 3)
    weight[1, 1] = torch.nan
    with pytest.raises(ValueError, match="finite"):
        PackedMatrix(weight, storage="int8")
    with pytest.raises(ValueError, match="at most"):
        PackedMatrix(torch.zeros(1, MAX_INT8_DEPTH + 1), storage="int8")
    with pytest.raises(ValueError, match="give one of"):
        PackedMatrix(torch.zeros(1, 1), storage="int3")  # type: ignore[arg-type]
