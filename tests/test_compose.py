"""From a configuration to an engine that answers, in this process and in its own."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest
import torch
from tests import tiny
from tests.engine import fake

from headrace.compose import build_engine, build_service, warm_up
from headrace.core.config import EngineConfig
from headrace.core.errors import BrokenCheckpoint, InvalidRequest, ModelNotFound
from headrace.core.outputs import SequenceDelta
from headrace.core.policy import Limits
from headrace.core.request import Request, SamplingParams
from headrace.core.retrieval import Retrieval
from headrace.engine.engine import Engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint("llama", tmp_path_factory.mktemp("llama"))


def config(folder: Path | str, **options: object) -> EngineConfig:
    return EngineConfig(**({"model": str(folder), "kv_gib": 0.01, "threads": 1} | options))  # type: ignore[arg-type]


def tokens(engine: Engine, job: Request) -> dict[int, list[int]]:
    out: dict[int, list[int]] = {}
    engine.add(job)
    while engine.busy:
        for delta in engine.step():
            assert delta.error is None
            out.setdefault(delta.index, []).extend(delta.tokens)
    return out


def greedy(prompt: list[int], new: int) -> list[int]:
    with torch.no_grad():
        out = tiny.build("llama").generate(
            torch.tensor([prompt]), max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=1
        )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("linears", ["module", "auto"])
@pytest.mark.parametrize("attention", ["reference", "auto"])
def test_an_engine_from_a_folder_answers_like_transformers(folder: Path, linears: str, attention: str) -> None:
    engine = build_engine(config(folder, linears=linears, attention=attention))
    job = Request("a", (5, 6, 7, 8), SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True))
    assert tokens(engine, job)[0] == greedy([5, 6, 7, 8], 20)
    stats = engine.stats()
    assert stats.slots_free + stats.slots_cached == stats.slots_total
    assert stats.steps == 20, "the warm-up is not counted"


def test_seeded_siblings_repeat_exactly_in_any_batch(folder: Path) -> None:
    engine = build_engine(config(folder))
    params = SamplingParams(n=4, seed=7, temperature=1.0, top_p=0.95, max_tokens=20, ignore_eos=True)
    alone = tokens(engine, Request("a", (5, 6, 7), params))
    for i in range(5):
        engine.add(Request(f"x{i}", tuple(range(4, 20 + i)), SamplingParams(max_tokens=30, ignore_eos=True)))
    engine.step()
    engine.add(Request("b", (5, 6, 7), params))
    again: dict[int, list[int]] = {}
    while engine.busy:
        for delta in engine.step():
            if delta.request_id == "b":
                again.setdefault(delta.index, []).extend(delta.tokens)
    assert again == alone
    assert len({tuple(t) for t in alone.values()}) > 1, "siblings draw from different streams"


def test_the_service_restarts_a_killed_engine_with_the_model(folder: Path) -> None:
    async def main() -> None:
        service = build_service(config(folder, served_name="tiny"))
        await service.start()
        await service.ready(120)
        assert (service.card.name, service.card.context) == ("tiny", tiny.CONTEXT)
        params = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
        job = Request("a", (5, 6, 7, 8), params)

        async def collect(request: Request) -> list[SequenceDelta]:
            return [d async for d in service.submit(request)]

        want = greedy([5, 6, 7, 8], 10)
        assert [t for d in await collect(job) for t in d.tokens] == want
        assert service.pid is not None
        os.kill(service.pid, signal.SIGKILL)
        while service.state == "ready":
            await asyncio.sleep(0.01)
        await service.ready(120)
        assert [t for d in await collect(job) for t in d.tokens] == want
        await service.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("options", "error", "field"),
    [
        ({"model": "no/such/folder/at/all"}, ModelNotFound, "model"),
        ({"policy": "magic"}, InvalidRequest, "policy"),
        ({"attention": "magic"}, InvalidRequest, "attention"),
        ({"linears": "magic"}, InvalidRequest, "linears"),
        ({"dtype": "int3"}, InvalidRequest, "dtype"),
        ({"device": "abacus"}, InvalidRequest, "device"),
        ({"max_context": 100_000}, InvalidRequest, "max_context"),
        ({"kv_gib": 1e-6}, InvalidRequest, "kv_gib"),
    ],
)
def test_a_wrong_option_is_named(folder: Path, options: dict[str, object], error: type[Exception], field: str) -> None:
    with pytest.raises(error) as caught:
        build_engine(config(folder, **options))
    assert caught.value.field == field  # type: ignore[attr-defined]


def test_a_truncated_checkpoint_is_refused(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        data = file.read_bytes()
        (tmp_path / file.name).write_bytes(data[:-100] if file.suffix == ".safetensors" else data)
    with pytest.raises(BrokenCheckpoint, match="safetensors"):
        build_engine(config(tmp_path))


@pytest.mark.parametrize("context", [2, 3, 4, 100])
def test_any_context_can_be_warmed_up(context: int) -> None:
    engine = fake.engine(context)
    warm_up(engine)
    assert engine.stats().finished == 2
    assert not engine.busy


def test_a_short_context_bounds_requests(folder: Path) -> None:
    engine = build_engine(config(folder, max_context=32, limits=Limits(max_sequences=4, max_step_tokens=8)))
    assert engine.card.context == 32
    with pytest.raises(InvalidRequest, match="the context holds 32"):
        engine.add(Request("a", (5,) * 30, SamplingParams(max_tokens=3)))


@pytest.mark.parametrize(
    "options", [{"quantize": "int8"}, {"kv_cache_dtype": "int8"}, {"quantize": "int8", "kv_cache_dtype": "int8"}]
)
def test_quantised_engines_answer_alike_in_any_company_and_say_what_it_costs(
    folder: Path, options: dict[str, str]
) -> None:
    engine = build_engine(config(folder, **options))
    card = engine.card
    assert (card.quantization, card.kv_cache_dtype) == (
        options.get("quantize", ""),
        options.get("kv_cache_dtype", "float32"),
    )
    assert card.quality is not None
    assert card.quality.tokens > 300
    assert 0 < abs(card.quality.nll - card.quality.nll_before) < 0.2
    assert 0.7 < card.quality.same_greedy <= 1
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    alone = tokens(engine, Request("a", (5, 6, 7, 8), params))[0]
    for name, prompt in (("b", (9, 10, 11)), ("c", tuple(range(20, 60))), ("d", (5, 6, 7, 8))):
        engine.add(Request(name, prompt, params))
    together: dict[str, list[int]] = {}
    while engine.busy:
        for delta in engine.step():
            together.setdefault(delta.request_id, []).extend(delta.tokens)
    assert together["d"] == alone
    stats = engine.stats()
    assert stats.slots_free + stats.slots_cached == stats.slots_total


def test_nothing_quantised_costs_nothing(folder: Path) -> None:
    card = build_engine(config(folder)).card
    assert (card.quantization, card.kv_cache_dtype, card.quality) == ("", "float32", None)


def test_int8_keys_and_values_leave_room_for_more(folder: Path) -> None:
    plain, rounded = (
        build_engine(config(folder, kv_cache_dtype=name)).stats().slots_total for name in ("auto", "int8")
    )
    assert rounded == pytest.approx(plain * 64 / 20, rel=0.01)  # heads of 16: 64 bytes become 16 and a scale of 4


@pytest.mark.parametrize(("option", "value"), [("quantize", "int4"), ("kv_cache_dtype", "fp8")])
def test_wrong_names_do_not_cost_a_load(option: str, value: str) -> None:
    with pytest.raises(InvalidRequest, match=f"{option} is '{value}'"):
        build_engine(config("nowhere", **{option: value}))


@pytest.mark.parametrize("kv", ["pq", "auto"])
def test_retrieval_by_configuration(folder: Path, kv: str) -> None:
    engine = build_engine(config(folder, kv=kv, kv_budget=0.2))
    assert engine.kv == Retrieval(kv, 0.2)
    assert len(tokens(engine, Request("a", (5,) * 40, SamplingParams(max_tokens=3, ignore_eos=True)))[0]) == 3


def test_retrieval_that_cannot_run_is_refused(tmp_path: Path) -> None:
    capped = tiny.checkpoint("gemma2", tmp_path)
    with pytest.raises(InvalidRequest, match="caps scores"):
        build_engine(config(capped, kv="pq"))
    assert build_engine(config(capped, kv="auto")).kv is None


def test_drafts_for_a_policy_without_use_for_them_are_refused(folder: Path) -> None:
    with pytest.raises(InvalidRequest, match="draft is 'ngram', but the policy chunked drafts nothing") as caught:
        build_engine(config("nowhere", policy="chunked", draft="ngram"))
    assert caught.value.field == "draft"
    build_engine(config(folder, policy="chunked", draft="off"))
