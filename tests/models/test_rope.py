"""Rotary variants that look at the longest position must not let a neighbour change a sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from tests import tiny
from tests.models.packing import TOLERANCE, feed, scattered, truth

from headrace.core.errors import InvalidRequest, UnsupportedModel
from headrace.models import rope
from headrace.models.cache.slots import SlotPool
from headrace.models.runner import ModelRunner

ORIGINAL, LONGEST = 32, 128
HALF = 8  # half a head: one factor per rotary frequency


def longrope() -> Any:
    parameters = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.1 * i for i in range(HALF)],
        "long_factor": [2.0 + 0.5 * i for i in range(HALF)],
        "original_max_position_embeddings": ORIGINAL,
        "factor": LONGEST / ORIGINAL,
    }
    return build(parameters)


def build(parameters: dict[str, Any]) -> Any:
    sizes = {**tiny._BASE, "max_position_embeddings": LONGEST, "original_max_position_embeddings": ORIGINAL}
    config = transformers.Phi3Config(**sizes, rope_parameters=parameters, sliding_window=None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.dim() >= 2:
                    parameter.copy_(torch.randn_like(parameter) * 0.15)
    return module


def short_beside(module: Any, length: int) -> torch.Tensor:
    """Logits of a 20-token sequence packed beside one of ``length`` tokens."""
    short, other = scattered([20, length], seed=1, pool=150)
    feed(ModelRunner(tiny.loaded("phi3", module), SlotPool(150), "reference"), [short, other], [20, length])
    return short.logits[0]


def settled(max_context: int | None) -> Any:
    module = longrope()
    rope.settle(module, max_context)
    return module


def test_unsettled_longrope_depends_on_the_neighbour() -> None:
    """Why any of this is needed."""
    difference = short_beside(longrope(), 100) - short_beside(longrope(), 10)
    assert difference.abs().max().item() > 1e-2


@pytest.mark.parametrize("max_context", [None, ORIGINAL])
def test_settled_longrope_does_not(max_context: int | None) -> None:
    difference = short_beside(settled(max_context), 100) - short_beside(settled(max_context), 10)
    assert difference.abs().max().item() <= TOLERANCE


def test_short_context_is_exact_for_short_prompts() -> None:
    short = scattered([20, 1], seed=1, pool=150)[0]
    expected = truth(longrope(), short.ids)
    assert (short_beside(settled(ORIGINAL), 10) - expected).abs().max().item() <= TOLERANCE
    assert (short_beside(settled(None), 10) - expected).abs().max().item() > 1e-2


def test_long_context_is_exact_for_long_prompts() -> None:
    (long,) = scattered([100], seed=2, pool=150)
    expected = truth(longrope(), long.ids)
    runner = ModelRunner(tiny.loaded("phi3", settled(None)), SlotPool(150), "reference")
    for count in (10, 60, 30):  # the first chunk alone would choose the short frequencies
        feed(runner, [long], [count])
    assert (torch.cat(long.logits) - expected).abs().max().item() <= TOLERANCE


def test_dynamic_scaling_ends_the_context_where_it_would_begin() -> None:
    config = transformers.LlamaConfig(
        **{**tiny._BASE, "max_position_embeddings": LONGEST},
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    )
    module = transformers.LlamaForCausalLM(config)
    original = int(module.model.rotary_emb.original_max_seq_len)
    assert rope.settle(module) == original


def test_contexts() -> None:
    module = tiny.build("llama")
    assert rope.settle(module) == tiny.CONTEXT
    assert rope.settle(module, 100) == 100
    with pytest.raises(InvalidRequest, match=f"made for {tiny.CONTEXT} tokens"):
        rope.settle(module, tiny.CONTEXT + 1)


def test_length_dependent_variants_on_some_layers_are_refused() -> None:
    module = tiny.build("gemma3")
    assert rope.settle(module) == tiny.CONTEXT
    module.config.rope_parameters["full_attention"]["rope_type"] = "dynamic"
    with pytest.raises(UnsupportedModel, match="full_attention"):
        rope.settle(module)
