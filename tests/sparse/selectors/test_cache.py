"""Selectors under transformers: everything kept is dense, and PQ there is PQCache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache

from headrace.core.errors import InvalidRequest
from headrace.sparse import PQCache, enable
from headrace.sparse.regions import Regions
from headrace.sparse.selectors import SELECTORS, SelectedCache, enable_selected


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, eos_token_id=None, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def _ids(rows: int = 2, length: int = 150) -> torch.Tensor:
    return torch.randint(1, 128, (rows, length), generator=torch.Generator().manual_seed(3))


def _logits(model: Any, cache: Any, ids: torch.Tensor, new: int = 12) -> torch.Tensor:
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=new, do_sample=False, output_logits=True,
        return_dict_in_generate=True, pad_token_id=0,
    )  # fmt: skip
    return torch.stack(out.logits, 1)


@pytest.mark.parametrize("name", sorted(set(SELECTORS) - {"pyramidkv"}))  # whose last layers never read all
def test_a_full_budget_gives_dense_logits(model: Any, name: str) -> None:
    ids = _ids()
    expected = _logits(model, DynamicCache(config=model.config), ids)
    found = _logits(enable_selected(model), SelectedCache(model.config, name, Regions(1.0)), ids)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("name", sorted(set(SELECTORS) - {"full"}))
def test_a_small_budget_does_not(model: Any, name: str) -> None:
    """Negative control: the selector really decides what is attended to."""
    ids = _ids()
    expected = _logits(model, DynamicCache(config=model.config), ids)
    found = _logits(enable_selected(model), SelectedCache(model.config, name, Regions(0.1, initial=2)), ids)
    assert torch.equal(found[:, 0], expected[:, 0])  # the prompt is read exactly
    assert (found - expected).abs().max() > 1e-3 * expected.abs().max()


def test_pq_is_the_same_as_pqcache(model: Any) -> None:
    ids = _ids()
    options: dict[str, Any] = {"codes": "2x4", "refresh": None}
    expected = _logits(enable(model), PQCache(model.config, budget=0.2, initial=4, crossover=0, **options), ids)
    cache = SelectedCache(model.config, "pq", Regions(0.2, initial=4), **options)
    assert (_logits(enable_selected(model), cache, ids) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_other_caches_are_not_touched(model: Any) -> None:
    ids = _ids()
    model.set_attn_implementation("sdpa")
    expected = _logits(model, DynamicCache(config=model.config), ids)
    assert torch.equal(_logits(enable_selected(model), DynamicCache(config=model.config), ids), expected)


def test_taking_back_and_padding_are_refused(model: Any) -> None:
    ids = _ids()
    cache = SelectedCache(model.config, "snapkv", Regions(0.1, initial=2))
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    _logits(enable_selected(model), cache, ids, new=2)
    with pytest.raises(InvalidRequest, match="drafts"):
        cache.layers[0].crop(100)
    with pytest.raises(InvalidRequest, match="beams"):
        cache.layers[0].reorder_cache(torch.tensor([1, 0]))
    with pytest.raises(InvalidRequest, match="quest9"):
        SelectedCache(model.config, "quest9", Regions(0.1))
