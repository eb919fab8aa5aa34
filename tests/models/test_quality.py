"""What quantisation is said to cost, against a reading by transformers itself."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from tests import tiny

from headrace.core.protocols import Quality
from headrace.models import quality
from headrace.models.cache.slots import SlotPool
from headrace.models.runner import ModelRunner


def ids(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(4, tiny.VOCAB, count).astype(np.int32)


def by_transformers(text: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.from_numpy(text).long()
    with torch.inference_mode():
        logits = tiny.build("llama", "eager")(tokens[None]).logits[0, :-1].double()
    return -logits.log_softmax(-1).gather(1, tokens[1:, None])[:, 0], logits.argmax(-1)


@pytest.mark.parametrize("count", [2, 64, 65, 150])
def test_a_reading_is_teacher_forced_likelihood(count: int) -> None:
    text = ids(count)
    found = quality.read_model(tiny.loaded("llama"), text)
    losses, greedy = by_transformers(text)
    assert len(found.losses) == count - 1
    assert torch.allclose(found.losses, losses, atol=1e-4)
    assert torch.equal(found.greedy, greedy)
    assert np.array_equal(found.ids, text)


def test_reading_leaves_the_pool_and_the_model_as_they_were() -> None:
    model = tiny.loaded("llama")
    implementation = model.module.config._attn_implementation
    quality.read_model(model, ids(10))
    assert model.module.config._attn_implementation == implementation
    pool = SlotPool(100)
    quality.read(ModelRunner(model, pool), pool, ids(90))
    assert pool.free == 100


def test_a_slow_machine_reads_less_but_something(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(0, 3)
    monkeypatch.setattr(quality.time, "perf_counter", lambda: next(clock))

    class Slow:
        def run(self, batch: object) -> object:
            raise AssertionError

    model, pool = tiny.loaded("llama"), SlotPool(300)
    runner = ModelRunner(model, pool)
    calls: list[int] = []
    run = runner.run

    class Counting:
        def run(self, batch: object) -> object:
            calls.append(1)
            return run(batch)  # type: ignore[arg-type]

    found = quality.read(Counting(), pool, ids(300), seconds=0.5)  # type: ignore[arg-type]
    assert len(calls) == 1
    assert len(found.losses) == 64
    assert len(found.ids) == 65


def test_a_comparison_covers_what_both_read() -> None:
    text = ids(100)
    losses, greedy = by_transformers(text)
    whole = quality.Reading(text, losses, greedy)
    part = quality.Reading(text[:41], losses[:40] + 0.25, torch.cat([greedy[:30], greedy[30:40] + 1]))
    found = quality.compare(whole, part)
    assert found.tokens == 40
    assert found.nll - found.nll_before == pytest.approx(0.25)
    assert found.same_greedy == pytest.approx(0.75)
    assert "(+0.2500), 75.0% of 40" in str(found)


def test_a_ruined_model_is_seen() -> None:
    text = ids(80)
    before = quality.read_model(tiny.loaded("llama"), text)
    broken = tiny.build("llama")
    broken.lm_head.weight.data = broken.lm_head.weight.data.roll(1, 0)
    after = quality.read_model(tiny.loaded("llama", broken), text)
    found: Quality = quality.compare(before, after)
    assert found.same_greedy < 0.2


def test_the_text_needs_a_tokenizer(tmp_path: Path) -> None:
    assert len(quality.sample(tmp_path, limit=100)) == 0
    folder = tiny.tokenizer(tiny.checkpoint("llama", tmp_path / "llama"))
    assert 300 < len(quality.sample(folder, limit=10_000)) < 2000
    assert len(quality.sample(folder, limit=70)) == 70
