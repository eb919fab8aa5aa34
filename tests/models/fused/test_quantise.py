"""Rounded weights: what rounding may cost, that rows stay independent, what is refused, and that memory is let go."""

from __future__ import annotations

import copy
import gc
import importlib.util
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests import tiny
from tests.models.packing import Fed, feed, ints, scattered
from torch import nn

from headrace.core.batch import Packer
from headrace.core.errors import InvalidRequest, UnsupportedModel
from headrace.models.cache.slots import SlotPool
from headrace.models.fused import quantise
from headrace.models.fused.linear import PackedLinear, choose_linears
from headrace.models.fused.quantise import Int8Linear
from headrace.models.runner import ModelRunner
from headrace.native import build

PATHS = ["module", pytest.param("native", marks=pytest.mark.skipif(not build.available(), reason="no compiler"))]
WAYS = [
    ("module", "int8"),
    pytest.param("native", "int8", marks=pytest.mark.skipif(not build.available(), reason="no compiler")),
    pytest.param("native", "nf4", marks=pytest.mark.skipif(not build.available(), reason="no compiler")),
]
FAMILIES = ["llama", "qwen3", "gemma2", "phi3", "qwen2"]


def rounded(family: str, linears: str, method: str | None = "int8") -> Any:
    model = tiny.loaded(family)
    assert choose_linears(model, linears, method) == linears
    return model


def linear(columns: int = 48, depth: int = 64, bias: bool = True) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(depth, columns, bias=bias).eval().requires_grad_(False)


def rows(count: int, depth: int = 64) -> torch.Tensor:
    return torch.randn(count, depth, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("bias", [False, True])
def test_a_product_is_that_of_the_rounded_weights_and_rows(bias: bool) -> None:
    """Held against float64 over the same codes; the wrong scale of a single output is seen."""
    made, exact = Int8Linear(linear(bias=bias).weight, linear(bias=bias).bias), linear(bias=bias)
    x = rows(9)
    codes, scales = quantise._rounded(x)
    expected = (codes.double() * scales.double()[:, None]) @ made.weight.double().T
    expected += 0 if exact.bias is None else exact.bias.double()
    assert (made(x).double() - expected).abs().max() < 1e-5
    assert 1e-4 < ((made(x) - exact(x)).norm() / exact(x).norm()) < 0.02
    made.scales[7] *= 1.2
    assert (made(x).double() - expected)[:, 7].abs().max() > 1e-2


def test_rows_do_not_depend_on_their_company_or_threads() -> None:
    made, x, before = Int8Linear(linear().weight), rows(33), torch.get_num_threads()
    together = made(x)
    assert all(torch.equal(made(x[i : i + 1])[0], together[i]) for i in range(33))
    try:
        torch.set_num_threads(3)
        assert torch.equal(made(x), together)
    finally:
        torch.set_num_threads(before)


def test_shapes_dtypes_and_rows_that_are_not_finite() -> None:
    made = Int8Linear(linear().weight.bfloat16(), linear().bias)
    assert made(rows(6).view(2, 3, 64).bfloat16()).shape == (2, 3, 48)
    assert made(rows(1).bfloat16()).dtype == torch.bfloat16
    assert made(rows(4)[:0]).shape == (0, 48)
    assert made(torch.zeros(1, 64)).eq(made.bias).all()
    for odd in (float("nan"), float("inf")):
        x = rows(2)
        x[1, 3] = odd
        assert made(x)[0].isfinite().all()
        assert made(x)[1].isnan().all()


@pytest.mark.skipif(not build.available(), reason="no compiler")
def test_both_paths_round_alike() -> None:
    packed, plain = PackedLinear.of(linear(), "int8"), Int8Linear(linear().weight, linear().bias)
    assert torch.allclose(packed.weight, plain.weight, rtol=1e-5, atol=0)
    assert torch.allclose(packed(rows(17)), plain(rows(17)), atol=1e-5)


@pytest.mark.parametrize(("linears", "method"), WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_near_and_rows_independent(family: str, linears: str, method: str) -> None:
    """In any company the same logits to the bit on the fast backend, and near the float model's."""
    model = rounded(family, linears, method)
    runner = ModelRunner(model, SlotPool(512), "numba")
    first = scattered([40, 33, 20], seed=1)
    feed(runner, first, [30, 33, 20])
    feed(runner, first, [10, 0, 0])
    for each, company in ((0, [30, 0, 0]), (1, [0, 33, 0]), (2, [0, 0, 20])):
        again = scattered([40, 33, 20], seed=1)
        feed(runner, again, company)
        shared = min(len(again[each].logits[0]), len(first[each].logits[0]))
        assert torch.equal(again[each].logits[0][:shared], first[each].logits[0][:shared])
    with torch.inference_mode():
        exact = tiny.build(family)(torch.from_numpy(first[1].ids).long()[None]).logits[0]
    off = (first[1].logits[0] - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert 1e-3 < off.median() < (0.25 if method == "int8" else 0.8)


@pytest.mark.parametrize("linears", PATHS)
def test_trees_over_int8_planes_and_weights_equal_their_paths(linears: str) -> None:
    runner = ModelRunner(rounded("qwen3", linears), SlotPool(512), "numba", kv_cache_dtype="int8")
    (deep,) = scattered([30], seed=3)
    feed(runner, [deep], [29])
    tokens, parents = ints([7, 8, 9, 10]), ints([-1, 0, 0, 2])
    spare = ints([s for s in range(512) if s not in set(deep.slots.tolist())])
    logits = runner.run(Packer().pack([deep.tree(tokens, parents, spare[:4])])).logits
    path = Fed(ints([*deep.ids[:29], 7, 9, 10]), ints([*deep.slots[:29], *spare[10:13]]), done=29)
    feed(runner, [path], [3])
    assert (logits[[0, 2, 3]] - path.logits[0]).abs().max() < 1e-4


@pytest.mark.parametrize("linears", PATHS)
def test_float_weights_are_let_go(linears: str) -> None:
    model = tiny.loaded("llama")
    watched = [
        weakref.ref(parameter)
        for name, parameter in model.module.named_parameters()
        if parameter.dim() == 2 and "embed" not in name
    ]
    choose_linears(model, linears, "int8")
    gc.collect()
    assert len(watched) > 15
    assert any(isinstance(child, PackedLinear | Int8Linear) for child in model.module.modules())
    assert not [ref for ref in watched if ref() is not None]


@pytest.mark.parametrize("linears", PATHS)
def test_a_tied_embedding_keeps_its_precision(linears: str) -> None:
    model = rounded("llama3_rope", linears)
    original = tiny.build("llama3_rope")
    assert torch.equal(model.module.model.embed_tokens.weight, original.model.embed_tokens.weight)
    assert type(model.module.lm_head) is not nn.Linear


@pytest.mark.skipif(not build.available(), reason="no compiler")
def test_the_head_stays_at_8_bits_under_nf4() -> None:
    module = rounded("llama", "native", "nf4").module
    assert module.lm_head.matrix.storage == "int8"
    assert module.model.layers[0].mlp.down.storage == "nf4"
    assert module.model.layers[0].self_attn.qkv.storage == "nf4"


def test_modules_used_twice_are_rounded_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = linear()
            self.b = self.a

        def get_output_embeddings(self) -> None:
            return None

    module = Twice()
    assert quantise.round_linears(module, "int8") == 1
    assert module.a is module.b


def test_an_unknown_method_names_the_choices() -> None:
    with pytest.raises(InvalidRequest, match="'int4': give one of int8, nf4") as caught:
        choose_linears(tiny.loaded("llama"), "auto", "int4")
    assert caught.value.field == "quantize"


def test_a_quantised_checkpoint_is_not_quantised_again() -> None:
    model = copy.copy(tiny.loaded("llama"))
    model.module.config.quantization_config = {"quant_method": "awq"}
    with pytest.raises(InvalidRequest, match="quantised with awq already: leave quantize out"):
        choose_linears(model, "auto", "int8")


def test_a_model_without_plain_linears_is_refused() -> None:
    module = nn.Sequential(nn.Embedding(4, 4))
    module.config = SimpleNamespace()
    with pytest.raises(UnsupportedModel, match="no plain linear layers"):
        choose_linears(SimpleNamespace(module=module), "auto", "int8")  # type: ignore[arg-type]


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_nf4_by_bitsandbytes_is_near_the_weights() -> None:
    made, exact, x = quantise._nf4_linear(linear(64).weight, linear(64).bias), linear(64), rows(5)
    assert 1e-2 < (made(x) - exact(x)).norm() / exact(x).norm() < 0.2


def test_nf4_without_kernels_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InvalidRequest, match="pip install bitsandbytes, or use int8"):
        choose_linears(tiny.loaded("llama"), "module", "nf4")
