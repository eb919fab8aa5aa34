"""The packed product against float64, bit by bit across batches, for every instruction set this machine can run."""

from __future__ import annotations

import pytest
import torch
from tests.native.numbers import error, values

from headrace.native import build
from headrace.native.skinny import PackedMatrix

pytestmark = pytest.mark.skipif(not build.available(), reason=f"no compiler: {build.why_not()}")

# Below, at and beyond the widths of panels (32, 16, 8 columns), row tiles (12, 6) and blocks of K (256).
SHAPES = [(1, 1), (5, 3), (8, 16), (31, 17), (32, 64), (33, 255), (70, 256), (96, 257), (129, 600)]
ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 17, 24, 25, 64, 129, 150]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_product_is_accurate(isa: str, shape: tuple[int, int], storage: str, with_bias: bool) -> None:
    weight = values(*shape, seed=1, exact_bfloat16=storage == "bfloat16")
    bias = values(shape[0], seed=2) if with_bias else None
    matrix = PackedMatrix(weight, bias, storage)  # type: ignore[arg-type]
    assert matrix.storage == storage
    for rows in ROWS:
        x = values(rows, shape[1], seed=rows)
        y = matrix.matmul(x)
        assert y.shape == (rows, shape[0])
        assert error(y, x, weight, bias) < 2e-6
        torchs = torch.nn.functional.linear(x, weight, bias)
        assert (y - torchs).norm() <= 1e-5 * torchs.norm()


def test_a_wrong_product_is_noticed(isa: str) -> None:
    weight, x = values(33, 65, seed=1), values(4, 65, seed=2)
    y = PackedMatrix(weight).matmul(x)
    y[2, 32] += 1e-3
    assert error(y, x, weight, None) > 1e-5


@pytest.mark.parametrize("shape", [(33, 255), (96, 257), (129, 600), (256, 768), (70, 512)], ids=str)
@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_rows_do_not_depend_on_their_batch(isa: str, shape: tuple[int, int], storage: str) -> None:
    matrix = PackedMatrix(
        values(*shape, seed=3, exact_bfloat16=storage == "bfloat16"),
        values(shape[0], seed=4),
        storage,  # type: ignore[arg-type]
    )
    x = values(300, shape[1], seed=5)
    alone = torch.cat([matrix.matmul(x[row : row + 1]) for row in range(len(x))])
    for rows in (*range(2, 65), 128, 129, 300):
        assert torch.equal(matrix.matmul(x[:rows]), alone[:rows]), rows


def test_both_storages_give_the_same_bits(isa: str) -> None:
    weight, x = values(70, 300, seed=6, exact_bfloat16=True), values(9, 300, seed=7)
    assert torch.equal(PackedMatrix(weight, storage="float32").matmul(x), PackedMatrix(weight).matmul(x))


def test_threads_do_not_change_bits(isa: str) -> None:
    matrix, x = PackedMatrix(values(200, 300, seed=8)), values(13, 300, seed=9)
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


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unpack_gives_back_the_bits(isa: str, shape: tuple[int, int]) -> None:
    for exact in (False, True):
        weight = values(*shape, seed=10, exact_bfloat16=exact)
        assert torch.equal(PackedMatrix(weight).unpack(), weight)


def test_storage_is_the_smallest_exact_one() -> None:
    exact, rounded = values(32, 64, seed=11, exact_bfloat16=True), values(32, 64, seed=11)
    assert PackedMatrix(exact).nbytes < 0.6 * PackedMatrix(rounded).nbytes
    exact[31, 63] = 1.0 + 2**-20
    assert PackedMatrix(exact).storage == "float32"
    with pytest.raises(ValueError, match="not exactly bfloat16"):
        PackedMatrix(rounded, storage="bfloat16")


def test_special_values_travel() -> None:
    weight = torch.zeros(3, 40)
    weight[0, 0], weight[1, 1] = float("inf"), float("nan")
    x = torch.ones(2, 40)
    y = PackedMatrix(weight).matmul(x)
    assert torch.isinf(y[:, 0]).all()
    assert torch.isnan(y[:, 1]).all()
    assert torch.equal(y[:, 2], torch.zeros(2))


def test_inputs_may_be_strided_empty_or_transposed() -> None:
    weight = values(40, 24, seed=12)
    matrix, wide = PackedMatrix(weight), values(9, 80, seed=13)
    assert torch.equal(matrix.matmul(wide[:, 8:32]), matrix.matmul(wide[:, 8:32].contiguous()))
    assert torch.equal(matrix.matmul(wide[::2, 8:32]), matrix.matmul(wide[::2, 8:32].contiguous()))
    tall = values(24, 5, seed=14)
    assert torch.equal(matrix.matmul(tall.T), matrix.matmul(tall.T.contiguous()))
    assert torch.equal(matrix.matmul(wide[:1, :24].expand(3, 24))[2:], matrix.matmul(wide[:1, :24]))
    assert matrix.matmul(wide[:0, :24]).shape == (0, 40)


def test_wrong_inputs_are_refused() -> None:
    matrix = PackedMatrix(values(8, 4, seed=15))
    for bad in (
        torch.zeros(2, 5),
        torch.zeros(4),
        torch.zeros(2, 4, dtype=torch.float64),
        torch.zeros(2, 4).bfloat16(),
    ):
        with pytest.raises(ValueError, match="float32"):
            matrix.matmul(bad)
    for weight in (torch.zeros(2, 3, 4), torch.zeros(3, 4).bfloat16()):
        with pytest.raises(ValueError, match="float32"):
            PackedMatrix(weight)
    with pytest.raises(ValueError, match="bias of 8"):
        PackedMatrix(torch.zeros(8, 4), torch.zeros(1))
