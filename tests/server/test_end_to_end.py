"""The bundled model behind the real engine, through the official client."""

from __future__ import annotations

import json
import threading
import time

import jsonschema
import openai
import pytest
from tests.server.conftest import Running, eventually, gather

HELLO = [{"role": "user", "content": "Tell me about water."}]
PROMPT = "The river runs"


@pytest.fixture(scope="module")
def model(real: Running) -> str:
    return real.client().models.list().data[0].id


def complete(real: Running, model: str, **options):
    return real.client().completions.create(
        model=model, prompt=PROMPT, **{"max_tokens": 24, "temperature": 0, **options}
    )


def test_stream_equals_the_whole(real: Running, model: str) -> None:
    client = real.client()
    options = {"model": model, "messages": HELLO, "max_tokens": 40, "temperature": 0}
    whole = client.chat.completions.create(**options)
    assert whole.choices[0].message.content
    assert whole.choices[0].finish_reason in ("stop", "length")
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 0, "the second request finds the first one's prompt"


def test_logprobs_of_greedy_text_are_the_best(real: Running, model: str) -> None:
    logprobs = complete(real, model, logprobs=3, max_tokens=10).choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 10
    for value, top in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert value == pytest.approx(max(top.values()))
        assert value <= 0


def test_seeded_answers_repeat_in_any_company(real: Running, model: str) -> None:
    def seeded() -> list[str]:
        answer = complete(real, model, n=4, seed=7, temperature=1.0)
        return [choice.text for choice in answer.choices]

    alone = seeded()
    assert len(set(alone)) > 1, "four sequences of one seed must differ from one another"
    noise = [lambda: complete(real, model, n=2, temperature=1.0, max_tokens=60)] * 3
    *_, crowded = gather(*noise, seeded)
    assert crowded == alone
    other = [choice.text for choice in complete(real, model, n=4, seed=8, temperature=1.0).choices]
    assert other != alone


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0.9, 1.3])
def test_schema_constrained_answers_validate(real: Running, model: str, temperature: float) -> None:
    answer = real.client().chat.completions.create(
        model=model,
        messages=HELLO,
        n=6,
        seed=3,
        temperature=temperature,
        max_tokens=600,
        response_format={"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": SCHEMA}},
    )
    finished = [choice for choice in answer.choices if choice.finish_reason == "stop"]
    assert finished
    for choice in finished:
        jsonschema.validate(json.loads(choice.message.content), SCHEMA)


def test_other_structures(real: Running, model: str) -> None:
    choice = complete(real, model, extra_body={"guided_choice": ["left", "right"]}).choices[0]
    assert choice.text in ("left", "right")
    number = complete(real, model, temperature=1, seed=1, extra_body={"guided_regex": "[0-9]{3}-[0-9]{2}"}).choices[0]
    assert number.finish_reason == "length" or len(number.text) == 6
    grammar = 'root ::= "yes" | "no"'
    assert complete(real, model, extra_body={"structured_outputs": {"grammar": grammar}}).choices[0].text in (
        "yes",
        "no",
    )


@pytest.mark.parametrize(
    "broken",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nonsense"}}}},
        {"guided_regex": "("},
        {"guided_grammar": "this is no grammar"},
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_invalid_structures_are_the_clients_fault(real: Running, model: str, broken: dict, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError):
        complete(real, model, stream=stream, extra_body=broken)


def test_stop_string_is_cut(real: Running, model: str) -> None:
    whole = complete(real, model, max_tokens=48).choices[0].text
    stop = whole[10:14]
    cut = complete(real, model, max_tokens=48, stop=stop).choices[0]
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"


def test_limits_of_the_context(real: Running, model: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(real, model, max_tokens=5000)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as caught:
        real.client().completions.create(model=model, prompt="word " * 5000)
    assert caught.value.code == "context_length_exceeded"


def test_slo_is_reported_from_the_engines_clock(real: Running, model: str) -> None:
    start = time.monotonic()
    answer = complete(real, model, extra_body={"slo": {"ttft_ms": 60_000, "tpot_ms": 60_000}})
    took_ms = (time.monotonic() - start) * 1e3
    slo = answer.usage.model_extra["slo"]
    assert slo["met"] is True
    assert 0 < slo["achieved"]["ttft_ms"] < took_ms
    assert 0 < slo["achieved"]["tpot_ms"] * (answer.usage.completion_tokens - 1) < took_ms


def test_leaving_frees_the_slots(real: Running, model: str) -> None:
    assert eventually(lambda: real.metrics()["headrace_running_sequences"] == 0)
    stream = real.client().completions.create(
        model=model, prompt=PROMPT, max_tokens=900, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    assert real.metrics()["headrace_slots_used"] > 0
    stream.close()
    assert eventually(lambda: real.metrics()["headrace_slots_used"] == 0)
    assert real.metrics()["headrace_engine_aborted_total"] >= 1


def test_crash_of_the_engine_is_an_error_and_passes(real: Running, model: str) -> None:
    service = real.service
    before, failures = service.pid, []

    def ask() -> None:
        try:
            complete(real, model, max_tokens=900, extra_body={"ignore_eos": True})
        except openai.APIStatusError as error:
            failures.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    assert eventually(lambda: real.metrics()["headrace_running_sequences"] > 0, 60)
    service._link.process.kill()
    asking.join(60)
    assert [error.status_code for error in failures] == [503]
    assert failures[0].code == "engine_crashed"
    real.ready()
    assert service.pid != before
    assert complete(real, model).choices[0].text
