"""Packed linears in real decoders: the same tokens, the same state, nothing kept twice."""

from __future__ import annotations

import copy
import logging
import weakref
from types import SimpleNamespace

import psutil
import pytest
import torch
from tests import tiny
from torch import nn

from headrace.core.errors import InvalidRequest
from headrace.models.fused import linear as linears
from headrace.models.fused.linear import PackedLinear, choose_linears, use_native_linears
from headrace.native import build

needs_compiler = pytest.mark.skipif(not build.available(), reason=f"no compiler: {build.why_not()}")


def _linear(columns: int = 40, depth: int = 24, bias: bool = True) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(depth, columns, bias=bias).eval().requires_grad_(False)


def _greedy(model: nn.Module, new: int = 24) -> torch.Tensor:
    prompt = torch.randint(4, tiny.VOCAB, (3, 20), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        out: torch.Tensor = model.generate(  # type: ignore[operator]
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, min_new_tokens=new, do_sample=False
        )
    return out[:, prompt.shape[1] :]


@needs_compiler
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_greedy_tokens_are_those_of_the_modules(family: str) -> None:
    reference = tiny.model(family)
    packed = copy.deepcopy(reference)
    count = use_native_linears(packed)
    assert count == sum(type(child) is nn.Linear for child in reference.modules())
    assert count > reference.config.num_hidden_layers
    assert not any(type(child) is nn.Linear for child in packed.modules())
    assert torch.equal(_greedy(packed), _greedy(reference))


@needs_compiler
def test_a_broken_weight_changes_tokens() -> None:
    packed = copy.deepcopy(tiny.model("llama"))
    packed.lm_head.weight.data = packed.lm_head.weight.data.roll(1, 0)
    use_native_linears(packed)
    assert not torch.equal(_greedy(packed), _greedy(tiny.model("llama")))


@needs_compiler
def test_weights_are_freed_and_a_tied_embedding_stays(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.build("qwen2")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    head, down = weakref.ref(model.lm_head.weight), weakref.ref(model.model.layers[0].mlp.down_proj.weight)
    with caplog.at_level(logging.INFO, logger=linears.__name__):
        use_native_linears(model)
    assert head() is model.model.embed_tokens.weight
    assert down() is None
    assert isinstance(model.lm_head, PackedLinear)
    assert "second copy" in caplog.text


@needs_compiler
def test_a_tied_head_is_left_alone_without_room(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    model = tiny.build("qwen2")
    use_native_linears(model)
    assert type(model.lm_head) is nn.Linear
    assert isinstance(model.model.layers[0].mlp.down_proj, PackedLinear)
    assert "no room" in caplog.text


@needs_compiler
def test_state_dict_and_weights_are_the_checkpoints() -> None:
    reference = tiny.model("qwen2")
    packed = copy.deepcopy(reference)
    use_native_linears(packed)
    expected, found = reference.state_dict(), packed.state_dict()
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(packed.get_output_embeddings().weight, reference.lm_head.weight)


@needs_compiler
def test_experts_and_odd_linears_are_left_alone() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    hooked, half = _linear(), _linear().bfloat16()
    hooked.register_forward_hook(lambda *_: None)
    plain = _linear()
    model = nn.ModuleDict({"doubled": Doubled(4, 4), "hooked": hooked, "narrow": half, "plain": plain, "again": plain})
    assert use_native_linears(model) == 1
    assert [type(model[name]) for name in ("doubled", "hooked", "narrow")] == [Doubled, nn.Linear, nn.Linear]
    assert isinstance(model["plain"], PackedLinear)
    assert model["again"] is model["plain"]

    moe = copy.deepcopy(tiny.model("qwen3_moe"))
    before = {name for name, parameter in moe.named_parameters() if parameter.dim() == 3}
    use_native_linears(moe)
    assert before
    assert before <= {name for name, _ in moe.named_parameters()}


@needs_compiler
@pytest.mark.parametrize("shape", [(24,), (7, 24), (1, 5, 24), (2, 3, 4, 24), (0, 24), (1, 0, 24)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_any_shape_of_input(shape: tuple[int, ...], bias: bool) -> None:
    module = _linear(bias=bias)
    packed, x = PackedLinear.of(module), torch.randn(shape)
    assert packed(x).shape == module(x).shape
    torch.testing.assert_close(packed(x), module(x), rtol=1e-5, atol=1e-6)
    assert (packed.in_features, packed.out_features) == (24, 40)
    assert repr(packed).startswith("PackedLinear(in_features=24, out_features=40, bias=")


@needs_compiler
def test_inputs_need_not_be_contiguous() -> None:
    module = _linear()
    packed, x = PackedLinear.of(module), torch.randn(3, 24, 5)
    torch.testing.assert_close(packed(x.transpose(1, 2)), module(x.transpose(1, 2)), rtol=1e-5, atol=1e-6)


@needs_compiler
def test_what_is_packed_stays_where_it_is() -> None:
    packed = PackedLinear.of(_linear())
    assert packed.to("cpu").float() is packed
    with pytest.raises(TypeError, match="linears='module'"):
        packed.bfloat16()
    with pytest.raises(TypeError, match="meta"):
        packed.to("meta")
    with pytest.raises(RuntimeError, match="no backward"):
        packed(torch.ones(2, 24, requires_grad=True))
    with pytest.raises(ValueError, match="float32"):
        packed(torch.ones(2, 24, dtype=torch.float64))


@needs_compiler
def test_choose_packs_where_it_can() -> None:
    for mode in ("auto", "native"):
        model = SimpleNamespace(module=nn.Sequential(_linear()))
        assert choose_linears(model, mode) == "native"
        assert isinstance(model.module[0], PackedLinear)


def test_choose_keeps_the_modules_when_told() -> None:
    model = SimpleNamespace(module=nn.Sequential(_linear()))
    assert choose_linears(model, "module") == "module"
    assert type(model.module[0]) is nn.Linear


def test_choose_explains_itself(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger=linears.__name__)
    half = SimpleNamespace(module=nn.Sequential(_linear().bfloat16()))
    assert choose_linears(half, "auto") == "module"
    assert "bfloat16 on cpu" in caplog.text
    with pytest.raises(InvalidRequest, match="bfloat16 on cpu") as raised:
        choose_linears(half, "native")
    assert raised.value.field == "linears"
    with pytest.raises(InvalidRequest, match="no plain linear"):
        choose_linears(SimpleNamespace(module=nn.Sequential(nn.ReLU())), "native")
    with pytest.raises(InvalidRequest, match=r"'fast'.*auto, module, native"):
        choose_linears(half, "fast")

    monkeypatch.setattr(build, "why_not", lambda: "no C++ compiler found")
    plain = SimpleNamespace(module=nn.Sequential(_linear()))
    assert choose_linears(plain, "auto") == "module"
    assert type(plain.module[0]) is nn.Linear
    with pytest.raises(InvalidRequest, match=r"no C\+\+ compiler found"):
        choose_linears(plain, "native")
