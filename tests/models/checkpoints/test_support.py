"""What is refused, by name, with the reason and an alternative."""

from __future__ import annotations

from typing import Any

import pytest
from tests import tiny
from tests.models.anymodel import small
from transformers import CONFIG_MAPPING

from headrace.core.errors import UnsupportedModel
from headrace.models.checkpoints.support import check_supported


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
        ("qwen2_vl", "multi-modal"),
        ("idefics3", "multi-modal"),
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
        check_supported(config)
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
    assert check_supported(tiny.config(family))[0] is type(tiny.model(family))


def test_a_window_nobody_tested_is_refused_and_an_idle_one_is_not() -> None:
    with pytest.raises(UnsupportedModel, match="window of 16"):
        check_supported(small("phimoe", sliding_window=16))
    check_supported(small("phimoe", sliding_window=tiny.CONTEXT))


def test_text_part_of_a_multimodal_type_must_be_a_tested_family() -> None:
    from transformers import LlavaConfig

    kind, text = check_supported(LlavaConfig(text_config=tiny.config("llama")))
    assert (kind.__name__, text.model_type) == ("LlamaForCausalLM", "llama")
    with pytest.raises(UnsupportedModel, match="multi-modal"):
        check_supported(LlavaConfig(text_config=small("phimoe", sliding_window=None)))
    with pytest.raises(UnsupportedModel, match="mamba"):
        check_supported(LlavaConfig(text_config=CONFIG_MAPPING["mamba"]()))
