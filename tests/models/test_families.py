"""Every family of the table against its whole forward, and what is refused, by name."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tests import tiny
from tests.models.packing import TOLERANCE, feed, scattered, truth
from transformers import CONFIG_MAPPING

from headrace.core.errors import UnsupportedModel
from headrace.models import families, probe
from headrace.models.families import check_supported, kv_shape
from headrace.models.runner import ModelRunner
from headrace.models.slots import SlotPool

TINY = {tiny.config(family).model_type for family in tiny.FAMILIES}
OTHERS = sorted(name for name in families.STACKED - TINY if name in CONFIG_MAPPING)


def small(kind: str, **changes: Any) -> Any:
    """A tiny configuration of any model type."""
    sizes = dict(tiny._BASE, num_experts=4, num_local_experts=4, n_routed_experts=4)
    sizes.update(num_experts_per_tok=2, moe_intermediate_size=48, **changes)
    return CONFIG_MAPPING[kind](**sizes)


def random_model(config: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
        with torch.no_grad():
            for parameter in module.parameters():
                noise = torch.randn_like(parameter)
                parameter.copy_(noise * 0.15) if parameter.dim() >= 2 else parameter.add_(noise * 0.1)
    module.tie_weights()
    return module.eval()


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("kind", OTHERS)
def test_family_of_the_table_equals_its_whole_forward(kind: str, window: int | None) -> None:
    config = small(kind, **({} if window is None else {"sliding_window": window}))
    assert check_supported(config) is not None
    module = random_model(config)
    sequences = scattered([40, 25], seed=1, pool=65)
    expected = [truth(module, s.ids) for s in sequences]
    runner = ModelRunner(tiny.loaded(kind, module), SlotPool(65), "reference")
    feed(runner, sequences, [25, 20])
    feed(runner, sequences, [15, 5])
    for s, whole in zip(sequences, expected, strict=True):
        assert whole.std().item() > 0.01
        assert (torch.cat(s.logits) - whole).abs().max().item() <= TOLERANCE


def test_the_table_names_only_known_types() -> None:
    if transformers.__version__ >= "5.23":
        assert {name for name in families.STACKED if name not in CONFIG_MAPPING} == set()
    assert families.STACKED >= TINY


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("mamba", "recurrent state"),
        ("mamba2", "recurrent state"),
        ("rwkv", "recurrent state"),
        ("jamba", "recurrent state"),
        ("recurrent_gemma", "linear attention"),
        ("lfm2", "convolutions"),
        ("qwen3_next", "linear attention"),
        ("deepseek_v2", "latent attention"),
        ("deepseek_v3", "latent attention"),
        ("bloom", "ALiBi"),
        ("mpt", "ALiBi"),
        ("t5", "encoder-decoder"),
        ("bart", "encoder-decoder"),
        ("bert", "encoder"),
        ("roberta", "encoder"),
        ("gemma3", "multi-modal"),
        ("llava", "multi-modal"),
        ("mllama", "image"),
        ("gemma3n", "other layers"),
        ("llama4", "chunked attention"),
        ("gptj", "computes attention itself"),
        ("doge", "mask"),
    ],
)
def test_refused_by_name_with_reason_and_alternative(kind: str, reason: str) -> None:
    config = CONFIG_MAPPING[kind]()
    with pytest.raises(UnsupportedModel, match=reason) as caught:
        check_supported(config, text=config.get_text_config(decoder=True))
    assert kind in caught.value.message
    assert "Instead, " in caught.value.message
    assert caught.value.field == "model"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"layer_types": ["full_attention", "linear_attention", "full_attention"]}, "linear_attention"),
        ({"kv_lora_rank": 8}, "latent attention"),
        ({"alibi": True}, "ALiBi"),
        ({"add_cross_attention": True}, "attends across"),
        ({"use_bidirectional_attention": True}, "later ones"),
    ],
)
def test_refused_by_what_the_configuration_says(changes: dict[str, Any], reason: str) -> None:
    config = tiny.config("llama")
    for name, value in changes.items():
        object.__setattr__(config, name, value)
    with pytest.raises(UnsupportedModel, match=reason):
        check_supported(config)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_tiny_families_are_supported(family: str) -> None:
    assert check_supported(tiny.config(family)) is type(tiny.model(family))


def test_a_window_nobody_tested_is_refused_and_an_idle_one_is_not() -> None:
    with pytest.raises(UnsupportedModel, match="window of 16"):
        check_supported(small("phimoe", sliding_window=16))
    check_supported(small("phimoe", sliding_window=tiny.CONTEXT))


def test_kv_shape_of_old_configurations() -> None:
    gpt2 = transformers.GPT2Config(n_embd=96, n_head=6, n_layer=2)
    assert kv_shape(gpt2) == (2, 6, 16)
    assert kv_shape(tiny.config("gemma2")) == (4, 2, 16)


def test_probe_passes_an_untested_family_and_leaves_it_as_it_was() -> None:
    config = transformers.GPTNeoXConfig(
        vocab_size=tiny.VOCAB, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96
    )
    module = random_model(config)
    model = tiny.loaded("gpt_neox", module)
    probe.verify(model)
    assert module.config._attn_implementation == "eager"
    ids = np.arange(4, 30, dtype=np.int32)
    expected = truth(module, ids)
    (sequence,) = scattered([26], seed=1, pool=26)
    sequence.ids = ids
    runner = ModelRunner(model, SlotPool(26), "reference")
    feed(runner, [sequence], [20])
    feed(runner, [sequence], [6])
    assert (torch.cat(sequence.logits) - expected).abs().max().item() <= TOLERANCE


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("nemotron", "cannot run over slots"), ("diffllama", "layers asked for attention"), ("doge", "other logits")],
)
def test_probe_refuses_what_slots_cannot_do(kind: str, reason: str) -> None:
    model = tiny.loaded(kind, random_model(small(kind)))
    with pytest.raises(UnsupportedModel, match=reason):
        probe.verify(model)


def test_anatomy_of_an_unknown_type_is_none() -> None:
    module = random_model(small("phimoe", sliding_window=None))
    assert families.anatomy(module) is None
    assert "position_ids" in inspect.signature(module.forward).parameters
