"""Every family of the table against its whole forward."""

from __future__ import annotations

import inspect

import pytest
import torch
import transformers
from tests import tiny
from tests.models.anymodel import random_model, small
from tests.models.packing import TOLERANCE, feed, scattered, truth
from transformers import CONFIG_MAPPING

from headrace.models import families
from headrace.models.cache.slots import SlotPool
from headrace.models.checkpoints.support import check_supported
from headrace.models.families import kv_shape
from headrace.models.runner import ModelRunner

TINY = {tiny.config(family).model_type for family in tiny.FAMILIES}
OTHERS = sorted(name for name in families.STACKED - TINY if name in CONFIG_MAPPING)


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("kind", OTHERS)
def test_family_of_the_table_equals_its_whole_forward(kind: str, window: int | None) -> None:
    config = small(kind, **({} if window is None else {"sliding_window": window}))
    assert check_supported(config)[1] is config
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


def test_kv_shape_of_old_configurations() -> None:
    gpt2 = transformers.GPT2Config(n_embd=96, n_head=6, n_layer=2)
    assert kv_shape(gpt2) == (2, 6, 16)
    assert kv_shape(tiny.config("gemma2")) == (4, 2, 16)


def test_anatomy_of_an_unknown_type_is_none() -> None:
    module = random_model(small("phimoe", sliding_window=None))
    assert families.anatomy(module) is None
    assert "position_ids" in inspect.signature(module.forward).parameters
