"""The seam in transformers: with everything retrieved, logits are dense attention's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache

from headrace.core.errors import InvalidRequest
from headrace.sparse import PQCache, enable
from headrace.sparse.index import PQIndex
from headrace.sparse.layer import PQLayer
from headrace.sparse.search import CellIndex, ScanIndex

PROMPT, NEW = 150, 12


def _model(kv_heads: int = 2) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=kv_heads, max_position_embeddings=1024, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def _ids(rows: int, length: int = PROMPT) -> torch.Tensor:
    return torch.randint(1, 128, (rows, length), generator=torch.Generator().manual_seed(3))


def _logits(model: Any, ids: torch.Tensor, cache: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    out = model.generate(
        ids, past_key_values=cache, max_new_tokens=NEW, do_sample=False, output_logits=True, return_dict_in_generate=True,
        pad_token_id=0, **options,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits, 1)


@pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize(("initial", "local"), [(32, 0.5), (0, 0.0), (0, 1.0), (8, 0.3)])
def test_a_full_budget_gives_dense_logits(kv_heads: int, initial: int, local: float) -> None:
    model, ids = _model(kv_heads), _ids(2)
    tokens, expected = _logits(model, ids, DynamicCache(config=model.config))
    cache = PQCache(enable(model).config, budget=1.0, initial=initial, local_share=local, crossover=0, codes="2x4")
    found_tokens, found = _logits(model, ids, cache)
    assert torch.equal(found_tokens, tokens)
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize("codes", ["2x3", "4x4"], ids=["cells", "scan"])
@pytest.mark.parametrize("residual", [False, True])
def test_a_retrieval_of_everything_gives_dense_logits(
    residual: bool, codes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unlike a full budget, this goes through the index, with a local window that hands tokens over."""
    model, ids = _model(), _ids(2)
    _, expected = _logits(model, ids, DynamicCache(config=model.config))
    cache = PQCache(enable(model).config, budget=0.2, initial=4, crossover=0, codes=codes, residual=residual)
    _everything(monkeypatch)
    _, found = _logits(model, ids, cache)
    assert all(layer.index is not None for layer in cache.layers)
    assert (found - expected).abs().max() < 1e-5


def _everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """All middle tokens are retrieved, though the layer still thinks that they are too many to read."""

    def all_of(kind: type[PQIndex]) -> Any:
        every = kind.select
        return lambda self, queries, k, scale: every(self, queries, self.length, scale)

    for kind in (PQIndex, CellIndex, ScanIndex):
        monkeypatch.setattr(kind, "select", all_of(kind))
    monkeypatch.setattr(PQLayer, "_wanted", lambda self, window: self.length)


def test_left_padding_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = _model(), _ids(2)
    mask = torch.ones_like(ids)
    mask[0, :37] = 0
    ids[0, :37] = 0
    _, expected = _logits(model, ids, DynamicCache(config=model.config), attention_mask=mask)
    _everything(monkeypatch)
    cache = PQCache(enable(model).config, budget=0.2, initial=4, crossover=0, codes="2x3", residual=True)
    _, found = _logits(model, ids, cache, attention_mask=mask)
    assert (found - expected).abs().max() < 1e-5


def test_padding_is_neither_clustered_nor_selected() -> None:
    """A padded sequence is answered as if it were alone, whatever stands in the padding."""
    model, ids = enable(_model()), _ids(2)
    mask = torch.ones_like(ids)
    mask[0, :37] = 0
    answers = []
    for filler in (0, 77):
        ids[0, :37] = filler
        cache = PQCache(model.config, budget=0.1, initial=4, crossover=0, codes="2x3")
        answers.append(_logits(model, ids, cache, attention_mask=mask)[1])
    assert torch.equal(*answers)


def test_a_small_budget_is_not_dense() -> None:
    """Negative control of the tests above: with few tokens read the logits do differ."""
    model, ids = _model(), _ids(2)
    _, expected = _logits(model, ids, DynamicCache(config=model.config))
    _, found = _logits(enable(model), ids, PQCache(model.config, budget=0.05, initial=1, crossover=0, codes="2x3"))
    assert (found - expected).abs().max() > 1e-3


def test_other_caches_behave_as_under_sdpa() -> None:
    model, ids = _model(), _ids(1)
    model.set_attn_implementation("sdpa")
    for kind in (None, "static"):
        options = {} if kind is None else {"cache_implementation": kind}
        before = model.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0, **options)
        enable(model)
        after = model.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0, **options)
        model.set_attn_implementation("sdpa")
        assert torch.equal(before, after)


def test_further_turns_and_drafts_equal_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second prompt on the same cache, and prompt-lookup speculation, which crops."""
    model, ids = _model(), _ids(1)
    ids = torch.cat([ids, ids[:, :40]], 1)
    dense = DynamicCache(config=model.config)
    expected = _turns(model, ids, dense)
    _everything(monkeypatch)
    found = _turns(enable(model), ids, PQCache(model.config, budget=0.2, initial=4, crossover=0, codes="2x3"))
    assert torch.equal(found, expected)
    cache = PQCache(model.config, budget=0.2, initial=4, crossover=0, codes="2x3")
    plain = model.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    drafted = model.generate(
        ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0, prompt_lookup_num_tokens=3, past_key_values=cache
    )
    assert torch.equal(drafted, plain)


def _turns(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    first = model.generate(ids, past_key_values=cache, max_new_tokens=5, do_sample=False, pad_token_id=0)
    again = torch.cat([first, _ids(1, 30)], 1)
    return model.generate(again, past_key_values=cache, max_new_tokens=NEW, do_sample=False, pad_token_id=0)


def test_beams_and_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = _model(), _ids(2)
    options: dict[str, Any] = {"max_new_tokens": NEW, "pad_token_id": 0, "num_beams": 3, "do_sample": False}
    expected = model.generate(ids, **options)
    _everything(monkeypatch)
    cache = PQCache(model.config, budget=0.2, initial=4, crossover=0, codes="2x3")
    assert torch.equal(enable(model).generate(ids, past_key_values=cache, **options), expected)


def test_sliding_layers_keep_their_own_cache() -> None:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, sliding_window=16, layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )  # fmt: skip
    model, ids = Gemma3ForCausalLM(config).eval(), _ids(1, 80)
    expected = _logits(model, ids, DynamicCache(config=config))[1]
    cache = PQCache(enable(model).config, budget=1.0, crossover=0, codes="2x3")
    assert [isinstance(layer, PQLayer) for layer in cache.layers] == [False, True, False]
    assert (_logits(model, ids, cache)[1] - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    "options",
    [{"budget": 0.0}, {"budget": 1.5}, {"codes": "2by6"}, {"codes": "3x6"}, {"refresh": -1.0}, {"initial": -1}],
)
def test_bad_options_name_themselves(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        PQCache(_model().config, **options)
    assert caught.value.field in options


def test_a_request_larger_than_the_device_completes() -> None:
    """K and V of the whole request exceed the device's share; the logits are those of a cache without a bound."""
    model, ids = enable(_model()), _ids(2)
    unbounded = PQCache(model.config, budget=0.2, initial=4, crossover=0, codes="2x3")
    _, expected = _logits(model, ids, unbounded)
    allowed = unbounded.device_bytes // 2
    cache = PQCache(model.config, budget=0.2, initial=4, crossover=0, codes="2x3", device_gib=allowed / (1 << 30))
    _, found = _logits(model, ids, cache)
    assert cache.device_bytes <= allowed
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
