"""LLM over the bundled model: what only a real model shows."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

import pytest

from headrace import LLM, SamplingParams, Structure
from headrace.core.errors import InvalidRequest

PROMPTS = ["Once upon a time", "def fibonacci(n):", "The capital of France is"]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(max_sequences=8, max_step_tokens=64) as model:
        yield model


def test_logprobs_have_the_chosen_token_among_the_best(llm: LLM) -> None:
    (result,) = llm.generate(PROMPTS[0], SamplingParams(max_tokens=8, seed=1, logprobs=3), use_tqdm=False)
    answer = result.outputs[0]
    assert answer.logprobs is not None
    assert len(answer.logprobs) == len(answer.token_ids) == 8
    for token, entry in zip(answer.token_ids, answer.logprobs, strict=True):
        assert token in entry
        assert len(entry) in (3, 4)
        best = sorted(entry.values(), key=lambda logprob: logprob.rank)
        assert [logprob.rank for logprob in best[:3]] == [1, 2, 3]
        assert best[0].logprob >= best[1].logprob >= best[2].logprob
    total = sum(entry[token].logprob for token, entry in zip(answer.token_ids, answer.logprobs, strict=True))
    assert answer.cumulative_logprob == pytest.approx(total)
    said = "".join(entry[token].decoded_token for token, entry in zip(answer.token_ids, answer.logprobs, strict=True))
    assert said == answer.text


def test_greedy_logprobs_are_the_best_and_no_logprobs_by_default(llm: LLM) -> None:
    (result,) = llm.generate(PROMPTS[0], SamplingParams(max_tokens=4, temperature=0, logprobs=0), use_tqdm=False)
    answer = result.outputs[0]
    assert all(entry[token].rank == 1 for token, entry in zip(answer.token_ids, answer.logprobs or [], strict=True))
    (result,) = llm.generate(PROMPTS[0], SamplingParams(max_tokens=4), use_tqdm=False)
    assert (result.outputs[0].logprobs, result.outputs[0].cumulative_logprob) == (None, None)


def test_four_seeded_answers_repeat_in_any_batch(llm: LLM) -> None:
    params = SamplingParams(n=4, seed=7, max_tokens=24)
    (alone,) = llm.generate(PROMPTS[0], params, use_tqdm=False)
    crowd = llm.generate(
        [PROMPTS[1], PROMPTS[0], PROMPTS[2]], [params.with_(seed=8, max_tokens=40), params, params], use_tqdm=False
    )
    texts = [answer.text for answer in alone.outputs]
    assert len(set(texts)) == 4
    assert [answer.text for answer in crowd[1].outputs] == texts
    assert [answer.text for answer in crowd[0].outputs] != texts


def test_a_schema_is_obeyed(llm: LLM) -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "age": {"type": "integer", "maximum": 150, "minimum": 0},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    params = SamplingParams(seed=3, max_tokens=60, structure=Structure("json_schema", json.dumps(schema)))
    (result,) = llm.chat([{"role": "user", "content": "A person."}], params, use_tqdm=False)
    assert result.outputs[0].finish_reason == "stop"
    person = json.loads(result.outputs[0].text)
    assert set(person) == {"name", "age"}
    assert 0 <= person["age"] <= 150


def test_a_schema_that_cannot_be_enforced_is_named_and_the_engine_lives_on(llm: LLM) -> None:
    bad = SamplingParams(max_tokens=4, structure=Structure("json_schema", '{"type": "nonsense"}'))
    with pytest.raises(InvalidRequest, match=r"prompts\[1\].*nonsense"):
        llm.generate(PROMPTS, [SamplingParams(max_tokens=4), bad, SamplingParams(max_tokens=4)], use_tqdm=False)
    results = llm.generate(PROMPTS, SamplingParams(max_tokens=4), use_tqdm=False)
    assert all(result.finished for result in results)


def test_metrics_are_there(llm: LLM) -> None:
    (result,) = llm.generate(PROMPTS[0] * 8, SamplingParams(max_tokens=4), use_tqdm=False)
    (again,) = llm.generate(PROMPTS[0] * 8, SamplingParams(max_tokens=4), use_tqdm=False)
    for metrics in (result.metrics, again.metrics):
        assert metrics.ttft_ms is not None
        assert metrics.tpot_ms is not None
        assert 0 < metrics.tpot_ms < math.inf
    assert again.metrics.cached_tokens > 0
