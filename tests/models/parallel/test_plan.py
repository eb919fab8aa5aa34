"""What can be shared by how many ranks, and what is said where it cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests import tiny

from headrace.core.errors import InvalidRequest, UnsupportedModel
from headrace.models.checkpoints.checks import parameter_shapes
from headrace.models.families import kv_shape
from headrace.models.parallel import plan
from headrace.models.parallel.group import device_of


def kind(family: str) -> Any:
    return type(tiny.model(family))


def check(family: str, size: int, **changes: Any) -> None:
    config = tiny.config(family)
    for name, value in changes.items():
        setattr(config, name, value)
    found = plan.plan_of(kind(family), config)
    plan.check("tiny", config, found, parameter_shapes(kind(family), config), size)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3", "olmo2", "qwen3_moe"])
def test_two_ranks_can_share(family: str) -> None:
    check(family, 2)


def test_heads_that_do_not_divide_are_named_with_what_does() -> None:
    with pytest.raises(InvalidRequest, match=r"tp is 3, but tiny has 4 attention heads: choose 1 or 2$") as caught:
        check("llama", 3)
    assert caught.value.field == "tp"


def test_fewer_kv_heads_than_ranks_are_named() -> None:
    with pytest.raises(InvalidRequest, match=r"2 K and V heads: choose 1 or 2$"):
        check("llama", 4)


def test_a_vocabulary_that_does_not_divide_is_named() -> None:
    with pytest.raises(InvalidRequest, match=r"513 rows in (lm_head|model.embed_tokens).weight: choose 1$"):
        check("llama", 2, vocab_size=513)


def test_whole_heads_on_every_rank_put_no_bound_on_ranks() -> None:
    """Phi-3 keeps Q, K and V in one matrix: its ranks share the products, and each attends with all heads."""
    check("phi3", 4)
    config = tiny.config("phi3")
    found = plan.plan_of(kind("phi3"), config)
    assert not plan.splits_heads(found)
    assert plan.local_config(config, found, 4) is config


def test_gate_and_up_in_one_matrix_are_each_divided() -> None:
    with pytest.raises(InvalidRequest, match=r"47 rows in .*gate_up_proj"):
        check("qwen3_moe", 2, moe_intermediate_size=47)


def test_a_model_without_a_plan_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModel, match="no tensor-parallel plan for GptOssForCausalLM: serve it with tp 1"):
        check("gpt_oss", 2)


def test_a_rank_sees_its_own_heads_and_the_model_keeps_its_own() -> None:
    config = tiny.config("qwen3")
    local = plan.local_config(config, plan.plan_of(kind("qwen3"), config), 2)
    assert kv_shape(local) == (2, 1, 16)
    assert local.num_attention_heads == 2
    assert kv_shape(config) == (2, 2, 16)


def test_more_gpus_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_of(1, "auto", 2) == torch.device("cuda", 1)
    with pytest.raises(InvalidRequest, match="tp is 4, but torch sees 2 CUDA devices"):
        device_of(0, "cuda", 4)
    with pytest.raises(InvalidRequest, match="CUDA_VISIBLE_DEVICES"):
        device_of(0, "cuda:1", 2)


def test_a_torch_for_gpus_cannot_split_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_get_accelerator", lambda: torch.device("cuda"))
    with pytest.raises(InvalidRequest, match="use a CPU build of torch, or tp 1"):
        device_of(0, "cpu", 2)
