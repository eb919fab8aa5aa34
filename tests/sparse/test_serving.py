"""Retrieval inside the engine: exact where everything is retrieved, together with whatever else the engine does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests import tiny

from headrace.core.batch import Batch
from headrace.core.config import EngineConfig
from headrace.core.errors import InvalidRequest
from headrace.core.policy import Limits
from headrace.core.request import Request, SamplingParams
from headrace.core.retrieval import Retrieval
from headrace.engine.engine import Engine
from headrace.engine.kv import KVSpace
from headrace.engine.sampling.sampler import TorchSampler
from headrace.models.cache.slots import SlotPool
from headrace.models.fused.linear import choose_linears
from headrace.models.runner import ModelRunner
from headrace.native.build import available
from headrace.sparse.codebook import Codes
from headrace.sparse.serving import ServingSettings, SlotRetriever
from headrace.sparse.sketch import Searcher

pytestmark = pytest.mark.skipif(not available(), reason="needs a C++ compiler")

SETTINGS = ServingSettings(Codes(2, 3), initial=4)
PQ = Retrieval("pq", 0.2, above=40)
EVERYTHING = 1 << 20


class Watched(ModelRunner):
    """Keeps the logits that sequences were drawn from."""

    def run(self, batch: Batch) -> Any:
        result = super().run(batch)
        self.seen.append((batch.tokens, result.logits.clone()))
        return result

    seen: list[tuple[int, torch.Tensor]]


def _engine(
    family: str = "llama", *, kv: Retrieval | None = PQ, settings: ServingSettings = SETTINGS, linears: str = "module",
    dtype: str = "auto", chunk: int = 512, policy: Any = None,
) -> tuple[Engine, Watched, SlotRetriever]:  # fmt: skip
    from headrace.compose import get_policy
    from headrace.models import families

    model = tiny.loaded(family)
    choose_linears(model, linears, None)
    pool = SlotPool(2048)
    retriever = SlotRetriever(pool, *families.kv_shape(model.config), settings)
    runner = Watched(model, pool, kv_cache_dtype=dtype, retriever=retriever)
    runner.seen = []
    limits = Limits(max_step_tokens=chunk, max_sequences=8)
    engine = Engine(
        runner, KVSpace(pool), policy or get_policy("chunked"), TorchSampler(), model.card, limits=limits, kv=kv
    )
    return engine, runner, retriever


def _prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(4, tiny.VOCAB, length).tolist())


def _answer(engine: Engine, name: str, prompt: tuple[int, ...], **fields: Any) -> list[int]:
    params = SamplingParams(temperature=0.0, max_tokens=fields.pop("new", 12), ignore_eos=True)
    engine.add(Request(name, prompt, params, **fields))
    out: list[int] = []
    while engine.busy:
        for delta in engine.step():
            if delta.error is not None:
                raise delta.error
            out += delta.tokens
    return out


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """All items are retrieved, through the index; notes how many questions were asked."""
    asked: list[int] = []
    right = Searcher.attend

    def attend(self: Searcher, questions: Any, out: Any) -> None:
        asked.append(len(questions))
        right(self, [replace(q, most=q.local - q.initial) for q in questions], out)

    monkeypatch.setattr(Searcher, "attend", attend)
    return asked


@pytest.mark.parametrize("linears", ["module", "native"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_all_items_retrieved_give_dense_logits(family: str, linears: str, everything: list[int]) -> None:
    """The modules, the native step with its breaks, and a family of whose layers half have windows."""
    logits = []
    for kv in (None, PQ):
        engine, runner, _ = _engine(family, kv=kv, linears=linears)
        tokens = _answer(engine, "one", _prompt(150))
        logits.append((tokens, torch.cat([rows for _, rows in runner.seen])))
    assert everything
    assert logits[0][0] == logits[1][0]
    torch.testing.assert_close(logits[0][1], logits[1][1], atol=1e-4, rtol=1e-4)


def test_a_share_differs() -> None:
    """Negative control of the comparison above: a budget that reads little changes the logits."""
    logits = []
    for kv in (None, replace(PQ, budget=0.05)):
        engine, runner, retriever = _engine(kv=kv)
        _answer(engine, "one", _prompt(300), new=4)
        logits.append(runner.seen[1][1])
        assert len(retriever) == 0
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_int8_planes(everything: list[int]) -> None:
    logits = []
    for kv in (None, PQ):
        engine, runner, _ = _engine(kv=kv, dtype="int8")
        _answer(engine, "one", _prompt(150))
        logits.append(torch.cat([rows for _, rows in runner.seen]))
    assert everything
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


def test_a_cached_prefix_brings_its_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _, retriever = _engine()
    shared = _prompt(200)
    _answer(engine, "one", shared + _prompt(20, 1), new=4)
    fits: list[int] = []
    right = SlotRetriever._fit_layer
    monkeypatch.setattr(
        SlotRetriever, "_fit_layer", lambda self, layer, *rest: fits.append(layer) or right(self, layer, *rest)
    )
    _answer(engine, "two", shared + _prompt(25, 2), new=4)
    assert not fits
    assert len(retriever.shelf) == 1
    _answer(engine, "three", _prompt(220, 3), new=4)
    assert fits


def test_codes_go_with_their_slots() -> None:
    engine, _, retriever = _engine()
    _answer(engine, "one", _prompt(200), new=4)
    assert len(retriever.shelf) == 1
    assert engine.space.radix is not None
    engine.space.radix.clear()
    assert len(retriever.shelf) == 0


def test_what_retrieval_wrote_is_not_shared() -> None:
    """K and V of an answer that read a share of its context are nobody else's."""
    engine, _, _ = _engine()
    prompt = _prompt(150)
    answer = _answer(engine, "one", prompt, new=30)
    exact, _, _ = _engine(kv=None)
    again = prompt + tuple(answer[:-1])
    assert _answer(engine, "two", again, kv=Retrieval("full")) == _answer(exact, "two", again)
    assert engine.space.cached >= len(prompt)


def test_chunks_batches_and_refresh(everything: list[int]) -> None:
    """Several sequences at once, prompts in chunks, codebooks that a long answer outgrows: still the dense answers."""
    settings = replace(SETTINGS, refresh=0.1)
    outputs = []
    for kv in (None, PQ):
        engine, _, _ = _engine(kv=kv, settings=settings, chunk=64)
        params = SamplingParams(temperature=0.0, max_tokens=80, ignore_eos=True)
        found: dict[str, list[int]] = {}
        for number, length in enumerate((60, 130, 200)):
            engine.add(Request(f"r{number}", _prompt(length, number), params))
        while engine.busy:
            for delta in engine.step():
                found.setdefault(delta.request_id, []).extend(delta.tokens)
        outputs.append(found)
    assert max(everything) > 1
    assert outputs[0] == outputs[1]


def test_trees_of_drafts(everything: list[int]) -> None:
    """Drafts are verified through the index, own rows seen by their ancestors alone."""
    from headrace.core.batch import Packer, Segment

    logits = []
    prompt = np.array(_prompt(150), np.int32)
    for wish in (None, PQ):
        _, runner, _ = _engine()
        slots = np.arange(160, dtype=np.int32)
        nothing = np.empty(0, np.int32)
        first = Segment(1, prompt, np.arange(150, dtype=np.int32), slots[:150], nothing, nothing)
        runner.run(Packer().pack([first]))
        parents = np.array([-1, 0, 0, 1, 3], np.int32)
        tree = Segment(
            1, prompt[:5], 150 + np.array([0, 1, 1, 2, 3], np.int32), slots[150:155], slots[:150],
            np.arange(5, dtype=np.int32), parents=parents, purpose="verify", kv=wish,
        )  # fmt: skip
        logits.append(runner.run(Packer().pack([tree])).logits)
    assert everything
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


def test_an_engine_without_an_index_refuses() -> None:
    engine, _, _ = _engine(kv=None)
    with pytest.raises(InvalidRequest, match="kv"):
        engine.add(Request("one", _prompt(20), SamplingParams(max_tokens=2), kv=PQ))
    assert len(_answer(engine, "two", _prompt(20), new=2, kv=Retrieval("auto"))) == 2


@pytest.mark.parametrize(
    "fields", [{"mode": "most"}, {"budget": 0.0}, {"budget": 2.0}, {"budget": float("nan")}, {"above": -1}]
)
def test_wishes_out_of_range(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        Retrieval(**{"mode": "pq", **fields})
    if "mode" in fields:
        with pytest.raises(InvalidRequest):
            EngineConfig(kv=fields["mode"])
