"""The recipe of the retrieval model: labels are next tokens, heads look back from the start, and what it saves loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from recipes.retrieval.data import IGNORED, batches
from recipes.retrieval.train import BACK, VOCABULARY, config, look_back, save, train
from transformers import LlamaForCausalLM

from headrace.bench.pqcache.tasks import synthetic

LANGUAGE = synthetic(VOCABULARY)


@pytest.mark.parametrize("length", [128, 512])
@pytest.mark.parametrize("copying", [0.0, 1.0])
def test_every_label_is_the_next_token(length: int, copying: float) -> None:
    ids, labels = next(batches(LANGUAGE, length, 16, copying, seed=0))
    assert ids.shape == labels.shape == (16, length)
    known = labels[:, :-1] != IGNORED
    assert torch.equal(labels[:, :-1][known], ids[:, 1:][known])
    assert known.float().mean() > 0.05
    assert not known.all()


def test_what_is_to_be_repeated_was_there_before() -> None:
    """A label's token follows some earlier occurrence of the two tokens before it: it can be known."""
    ids, labels = next(batches(LANGUAGE, 128, 8, 1.0, seed=1))
    for row, wanted in zip(ids.tolist(), labels.tolist(), strict=True):
        for place, label in enumerate(wanted):
            if label != IGNORED:
                earlier = [row[i + 2] for i in range(place - 1) if row[i : i + 2] == row[place - 1 : place + 1]]
                assert label in earlier


def test_batches_are_seeded() -> None:
    first, second = (next(batches(LANGUAGE, 128, 4, 0.5, seed=3))[0] for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, next(batches(LANGUAGE, 128, 4, 0.5, seed=4))[0])


def test_heads_look_back_before_any_training() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(config()).eval()
    ids = torch.randint(1, VOCABULARY, (1, 64))

    def back(head: int) -> float:
        with torch.inference_mode():
            weights = model(ids, output_attentions=True).attentions[0][0, head]
        return float(weights.diagonal(-BACK[head])[8:].mean())

    model.set_attn_implementation("eager")
    assert max(back(head) for head in range(4)) < 0.2  # control
    look_back(model.model.layers[0].self_attn, config().rope_parameters["rope_theta"])
    assert min(back(head) for head in range(4)) > 0.5


def test_a_short_run_writes_what_transformers_loads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(config()).train()
    before = model.model.layers[1].mlp.up_proj.weight.clone()
    state = train(model, LANGUAGE, minutes=0.02, seed=0, out=tmp_path)
    assert state["steps"] >= 1
    assert not torch.equal(before, model.model.layers[1].mlp.up_proj.weight)
    save(model, tmp_path, state)
    assert (tmp_path / "model.safetensors").stat().st_size < 2_000_000
    again = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight.to(torch.bfloat16).float())
