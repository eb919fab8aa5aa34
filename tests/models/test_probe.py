"""The self-check of families that no test covers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from tests import tiny
from tests.models.anymodel import random_model, small
from tests.models.packing import TOLERANCE, feed, scattered, truth

from headrace.core.errors import UnsupportedModel
from headrace.models import probe
from headrace.models.cache.slots import SlotPool
from headrace.models.runner import ModelRunner


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
