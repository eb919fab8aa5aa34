"""Fused modules in real decoders: as many as the family allows, the same tokens, and no swap without agreement."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests import tiny
from torch import nn

from headrace.models.fused.linear import use_native_linears
from headrace.models.fused.modules import FusedAttention, FusedMLP, FusedNorm, fuse
from headrace.native import build

pytestmark = pytest.mark.skipif(not build.available(), reason=f"no compiler: {build.why_not()}")

# What stays the checkpoint's own: mixtures have no single MLP, and gpt-oss rotates half as many angles.
NO_MLP = {"qwen3_moe", "mixtral", "gpt_oss"}
NO_ATTENTION = {"gpt_oss"}


def _logits(model: nn.Module, rows: int = 2) -> torch.Tensor:
    ids = torch.randint(4, tiny.VOCAB, (rows, 30), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        found: torch.Tensor = model(ids).logits
    return found


def _greedy(model: Any) -> torch.Tensor:
    prompt = torch.randint(4, tiny.VOCAB, (3, 20), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        out: torch.Tensor = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, min_new_tokens=24, do_sample=False
        )
    return out


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_families_are_fused_and_unchanged(family: str) -> None:
    reference = tiny.model(family)
    fused = copy.deepcopy(reference)
    layers = reference.config.num_hidden_layers
    counts = fuse(fused)
    assert counts["attention"] == (0 if family in NO_ATTENTION else layers)
    assert counts["mlp"] == (0 if family in NO_MLP else layers)
    assert counts["norm"] >= 2 * layers + 1
    use_native_linears(fused)
    expected = _logits(reference)
    assert (_logits(fused) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(_greedy(fused), _greedy(reference))
    assert fused.config._attn_implementation == reference.config._attn_implementation


def _llama() -> Any:
    return copy.deepcopy(tiny.model("llama"))


def test_attention_that_does_anything_else_is_kept() -> None:
    model = _llama()
    first, second, third = (layer.self_attn for layer in model.model.layers)

    class Clipped(type(first)):  # type: ignore[misc]
        def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
            out, weights = super().forward(hidden_states, **kwargs)
            return out.clamp(-1e-3, 1e-3), weights

    class Scaled(type(first)):  # type: ignore[misc]
        def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
            return super().forward(hidden_states * 1.001, **kwargs)

    first.__class__, second.__class__ = Clipped, Scaled
    assert fuse(model)["attention"] == 1
    assert [type(layer.self_attn) for layer in model.model.layers] == [Clipped, Scaled, FusedAttention]
    assert model.model.layers[2].self_attn.layer_idx == third.layer_idx == 2


def test_settings_that_change_from_call_to_call_are_not_frozen() -> None:
    model = _llama()
    attention = model.model.layers[0].self_attn

    class Restless(type(attention)):  # type: ignore[misc]
        def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
            return super().forward(hidden_states, sliding_window=hidden_states.shape[1], **kwargs)

    attention.__class__ = Restless
    assert fuse(model)["attention"] == 2
    assert isinstance(model.model.layers[0].self_attn, Restless)


def test_mlps_and_norms_that_do_anything_else_are_kept() -> None:
    model = _llama()
    model.model.layers[0].mlp.act_fn = nn.Tanh()
    model.model.layers[1].mlp.gate_proj.register_forward_hook(lambda *_: None)
    norm = model.model.norm

    class Shifted(type(norm)):  # type: ignore[misc]
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return torch.add(super().forward(hidden_states), 1e-3)

    norm.__class__ = Shifted
    counts = fuse(model)
    assert counts["mlp"] == 1
    assert isinstance(model.model.layers[2].mlp, FusedMLP)
    assert isinstance(model.model.norm, Shifted)
    assert isinstance(model.model.layers[0].input_layernorm, FusedNorm)


def test_layer_norm_and_half_precision_are_kept() -> None:
    model = nn.Sequential(nn.LayerNorm(8, bias=False), nn.RMSNorm(8, eps=1e-6).bfloat16(), nn.RMSNorm(8, eps=1e-6))
    assert fuse(model)["norm"] == 1
    assert [type(child) for child in model] == [nn.LayerNorm, nn.RMSNorm, FusedNorm]


def test_rows_do_not_depend_on_their_batch() -> None:
    model = _llama()
    fuse(model)
    attention, mlp, norm = model.model.layers[0].self_attn, model.model.layers[0].mlp, model.model.norm
    x = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(0))
    angles = torch.randn(1, 9, 16, generator=torch.Generator().manual_seed(1))
    together = attention._project(x, (angles.cos(), angles.sin()))
    for row in range(9):
        one = x[:, row : row + 1]
        assert torch.equal(mlp(x)[:, row : row + 1], mlp(one))
        assert torch.equal(norm(x)[:, row : row + 1], norm(one))
        alone = attention._project(one, (angles.cos()[:, row : row + 1], angles.sin()[:, row : row + 1]))
        assert all(torch.equal(a[:, :, row : row + 1], b) for a, b in zip(together, alone, strict=True))


def test_gradients_are_refused_and_not_lost() -> None:
    model = _llama()
    fuse(model)
    with pytest.raises(RuntimeError, match="no backward"):
        model(torch.tensor([[5, 6, 7]]))
    with pytest.raises(RuntimeError, match="no backward"):
        model.model.layers[0].mlp(torch.ones(1, 2, 64, requires_grad=True))


def test_fused_modules_stay_where_they_are() -> None:
    model = _llama()
    fuse(model)
    use_native_linears(model)
    for part in (model.model.layers[0].self_attn, model.model.layers[0].mlp, model.model.norm, model.lm_head):
        with pytest.raises(TypeError, match="linears='module'"):
            part.bfloat16()
