"""Chat completions through the official client."""

from __future__ import annotations

import json

import openai
import pytest
from tests.server.conftest import Serve, eventually
from tests.server.fake_service import MODEL, FakeService

from headrace.core.request import SLO, Structure
from headrace.core.retrieval import Retrieval
from headrace.server.api.replies import ChatReply
from headrace.server.slo.classes import SLOClasses

HELLO = [{"role": "user", "content": "héllo"}]


def say(text: str, **more) -> FakeService:
    return FakeService(say=lambda request, index: text.encode(), **more)


def test_answer_has_every_field(serve: Serve) -> None:
    client = serve(say("Ça va?")).client()
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=HELLO, service_tier="default")
    body = json.loads(raw.content)
    ChatReply.model_validate(body)
    answer = raw.parse()
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.content == "Ça va?"
    assert answer.choices[0].finish_reason == "stop"
    assert body["choices"][0]["stop_reason"] is None
    assert answer.system_fingerprint.startswith("fp_")
    assert answer.service_tier == "default"
    assert answer.usage.completion_tokens == 8  # seven bytes and end-of-text
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    assert raw.headers["x-request-id"].startswith("req_")


def test_prompt_goes_through_the_template(serve: Serve, byte_tokenizer) -> None:
    service = say("x")
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "c", "name": "ann"},
    ]
    serve(service).client().chat.completions.create(
        model=MODEL, messages=messages, extra_body={"chat_template_kwargs": {"suffix": "!"}}
    )
    expected = "<|system|>be brief<|end|><|user|>a\nb<|end|><|assistant|><|end|><|user|>c<|end|><|assistant|>!"
    assert byte_tokenizer.decode(service.seen[0].prompt, skip_special_tokens=False) == expected


def test_generation_prompt_can_be_left_out(serve: Serve, byte_tokenizer) -> None:
    service = say("x")
    serve(service).client().chat.completions.create(
        model=MODEL, messages=HELLO, extra_body={"add_generation_prompt": False}
    )
    assert byte_tokenizer.decode(service.seen[0].prompt, skip_special_tokens=False) == "<|user|>héllo<|end|>"


def test_parameters_reach_the_engine(serve: Serve) -> None:
    service = say("x")
    running = serve(service, api_keys=(("ann", "k1"),), slo_classes=SLOClasses({"fast": SLO(ttft_ms=100, tpot_ms=20)}))
    running.client("k1").chat.completions.create(
        model=MODEL,
        messages=HELLO,
        n=2,
        temperature=0.5,
        top_p=0.9,
        max_completion_tokens=7,
        seed=7,
        stop=["END", "§"],
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={"65": 3},
        logprobs=True,
        top_logprobs=2,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "a", "strict": True, "schema": {"type": "object"}},
        },
        user="u",
        service_tier="fast",  # type: ignore[arg-type]
        extra_body={
            "top_k": 5,
            "min_p": 0.1,
            "repetition_penalty": 1.2,
            "min_tokens": 2,
            "ignore_eos": True,
            "stop_token_ids": [3],
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,
            "priority": -4,
            "cache_salt": "s",
            "slo": {"ttft_ms": 250},
            "kv": {"mode": "pq", "budget": 0.25},
        },
    )
    request = service.seen[0]
    params = request.params
    assert (params.n, params.temperature, params.top_p, params.top_k, params.min_p) == (2, 0.5, 0.9, 5, 0.1)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.2, 0.5, -0.5)
    assert (params.max_tokens, params.min_tokens, params.seed, params.logprobs) == (7, 2, 7, 2)
    assert params.stop == ("END", "§")
    assert params.stop_token_ids == [3]
    assert params.include_stop
    assert params.ignore_eos
    assert not params.skip_special_tokens
    assert params.logit_bias == {65: 3.0}
    assert params.structure == Structure("json_schema", '{"type": "object"}')
    assert (request.priority, request.tier, request.cache_salt, request.owner) == (-4, "custom", "s", "ann")
    assert request.slo == SLO(ttft_ms=250)  # the body decides alone
    assert request.kv == Retrieval("pq", 0.25)
    assert request.arrival > 0


def test_max_tokens_defaults_to_the_rest_of_the_context(serve: Serve) -> None:
    service = FakeService(say=lambda request, index: b"x", context=100)
    client = serve(service).client()
    client.chat.completions.create(model=MODEL, messages=HELLO)
    assert service.seen[0].params.max_tokens == 100 - len(service.seen[0].prompt)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=HELLO, max_completion_tokens=99)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "max_completion_tokens"
    assert "99" in caught.value.message
    assert "100" in caught.value.message
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "x" * 200}])
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "messages"


def test_length_ends_the_answer(serve: Serve) -> None:
    answer = serve(say("abcdef")).client().chat.completions.create(model=MODEL, messages=HELLO, max_tokens=3)
    assert answer.choices[0].message.content == "abc"
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("burst", [1, 2, 3, 50])
def test_stop_string_over_tokens_is_cut_and_cancels_the_rest(serve: Serve, burst: int) -> None:
    service = say("one STOP two" + "x" * 500, burst=burst, delay_s=0.001)
    client = serve(service).client()
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=HELLO, stop="STOP")
    choice = json.loads(raw.content)["choices"][0]
    assert choice["message"]["content"] == "one "
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "STOP")
    assert json.loads(raw.content)["usage"]["completion_tokens"] == 8
    assert eventually(lambda: not service.live)
    assert service.cancelled


def test_without_the_stop_string_everything_comes(serve: Serve) -> None:
    answer = serve(say("one STOP two")).client().chat.completions.create(model=MODEL, messages=HELLO, stop="STOP!")
    assert answer.choices[0].message.content == "one STOP two"


def test_stop_token_id_is_named(serve: Serve) -> None:
    client = serve(say("a")).client()
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=HELLO, extra_body={"stop_token_ids": [256]}
    )
    assert json.loads(raw.content)["choices"][0]["stop_reason"] == 256


def test_n_answers_in_order(serve: Serve) -> None:
    service = FakeService(say=lambda request, index: b"abcd"[: 4 - index])
    answer = serve(service).client().chat.completions.create(model=MODEL, messages=HELLO, n=4)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.message.content for choice in answer.choices] == ["abcd", "abc", "ab", "a"]
    assert answer.usage.completion_tokens == 5 + 4 + 3 + 2


def test_stop_string_of_one_choice_cancels_that_one_only(serve: Serve) -> None:
    service = FakeService(say=lambda request, index: b"xSxxxxxxxxxx" if index else b"yyyyyyyyyyyy", delay_s=0.002)
    answer = serve(service).client().chat.completions.create(model=MODEL, messages=HELLO, n=2, stop="S")
    assert [choice.message.content for choice in answer.choices] == ["y" * 12, "x"]
    assert service.cancelled == [(service.seen[0].id, 1)]


def test_logprobs_are_aligned_with_the_text(serve: Serve) -> None:
    client = serve(say("hé")).client()
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens == 4
    assert [entry.bytes for entry in content[:3]] == [[0x68], [0xC3], [0xA9]]
    assert bytes(b for entry in content[:3] for b in entry.bytes).decode() == answer.choices[0].message.content
    assert content[0].token == "h"
    assert content[0].logprob == -1.25
    assert [(top.token, top.logprob) for top in content[0].top_logprobs] == [("i", -0.5), ("h", -1.25), ("j", -9999.0)]
    assert content[3].token == "<|end|>"
    plain = client.chat.completions.create(model=MODEL, messages=HELLO, logprobs=True)
    assert plain.choices[0].logprobs.content[0].top_logprobs == []
    assert client.chat.completions.create(model=MODEL, messages=HELLO).choices[0].logprobs is None


def test_slo_is_measured_and_echoed(serve: Serve) -> None:
    client = serve(say("abcdefgh", delay_s=0.01)).client()

    def ask(**targets: float) -> dict:
        answer = client.chat.completions.create(model=MODEL, messages=HELLO, extra_body={"slo": targets})
        return answer.usage.model_extra["slo"]

    good = ask(ttft_ms=20_000, tpot_ms=20_000)
    assert (good["ttft_ms"], good["tpot_ms"], good["met"]) == (20_000, 20_000, True)
    assert 9 < good["achieved"]["tpot_ms"] < 2000
    assert 9 < good["achieved"]["ttft_ms"] < 5000
    assert ask(tpot_ms=1)["met"] is False
    assert ask(ttft_ms=1)["met"] is False
    assert ask()["met"] is None


def test_slo_header(serve: Serve) -> None:
    service = say("a")
    client = serve(service).client()
    client.chat.completions.create(
        model=MODEL, messages=HELLO, extra_headers={"X-Headrace-SLO": "ttft_ms=200, tpot_ms=50.5"}
    )
    assert service.seen[0].slo == SLO(200, 50.5)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=HELLO, extra_headers={"X-Headrace-SLO": "ttft_ms=soon"})
    assert caught.value.param == "X-Headrace-SLO"


def test_unknown_fields_are_ignored_and_null_means_not_given(serve: Serve) -> None:
    answer = (
        serve(say("a"))
        .client()
        .chat.completions.create(
            model=MODEL,
            messages=HELLO,
            extra_body={
                "temperature": None,
                "stop": None,
                "n": None,
                "logit_bias": None,
                "tools": None,
                "frobnicate": {"a": [1]},
            },
        )
    )
    assert answer.choices[0].message.content == "a"


BAD = {
    "tools": {"tools": [{"type": "function", "function": {"name": "f"}}]},
    "functions": {"functions": [{"name": "f"}]},
    "tool_choice": {"tool_choice": "required"},
    "modalities": {"modalities": ["audio"]},
    "best_of": {"best_of": 3},
    "top_logprobs": {"top_logprobs": 2},
    "temperature": {"temperature": -1},
    "max_tokens": {"max_tokens": -5},
    "n": {"n": 0},
    "logit_bias": {"logit_bias": {"A": 1}},
    "stop": {"stop": [""]},
    "min_tokens": {"min_tokens": 9, "max_tokens": 3},
    "service_tier": {"service_tier": "turbo"},
    "slo": {"slo": {"tpot_ms": -1}},
    "speculate": {"speculate": "maybe"},
    "response_format": {"response_format": {"type": "json_schema"}},
    "structured_outputs": {"structured_outputs": {"regex": "a", "choice": ["b"]}},
    "guided_json": {"guided_json": "{not json"},
    "guided_regex": {"guided_regex": "a+", "response_format": {"type": "json_object"}},
    "seed": {"seed": 1 << 80},
    "chat_template_kwargs": {"chat_template_kwargs": {"tokenize": False}},
}


@pytest.mark.parametrize("param", BAD)
def test_refusals_name_the_field(serve: Serve, param: str) -> None:
    service = say("a")
    with pytest.raises(openai.BadRequestError) as caught:
        serve(service).client().chat.completions.create(model=MODEL, messages=HELLO, extra_body=BAD[param])
    assert caught.value.param == param
    assert param in caught.value.message
    assert caught.value.type == "invalid_request_error"
    assert not service.seen


MESSAGES = {
    "image": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]}],
    "tool role": [{"role": "tool", "content": "1", "tool_call_id": "a"}],
    "tool calls": [{"role": "assistant", "content": None, "tool_calls": [{"id": "a"}]}],
    "role": [{"role": "wizard", "content": "a"}],
    "no content": [{"role": "user", "content": None}],
    "template refuses": [{"role": "assistant", "content": "I begin"}],
    "surrogate": [{"role": "user", "content": "\ud800"}],
    "nothing": [],
}


@pytest.mark.parametrize("kind", MESSAGES)
def test_bad_messages(serve: Serve, kind: str) -> None:
    body = json.dumps({"model": MODEL, "messages": MESSAGES[kind]}).encode()
    reply = serve().http().post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == "messages"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"guided_json": {"type": "object"}}, Structure("json_schema", '{"type": "object"}')),
        ({"guided_json": '{"type": "array"}'}, Structure("json_schema", '{"type": "array"}')),
        ({"guided_regex": "a+"}, Structure("regex", "a+")),
        ({"guided_choice": ["a", "b"]}, Structure("choice", '["a", "b"]')),
        ({"guided_grammar": "root ::= 'a'"}, Structure("ebnf", "root ::= 'a'")),
        ({"structured_outputs": {"json": {"a": 1}}}, Structure("json_schema", '{"a": 1}')),
        ({"structured_outputs": {"json_object": True}}, Structure("json_object")),
        ({"structured_outputs": {"choice": ["a"]}}, Structure("choice", '["a"]')),
        ({"response_format": {"type": "json_object"}}, Structure("json_object")),
        ({"response_format": {"type": "text"}}, None),
    ],
)
def test_structures(serve: Serve, given: dict, expected: Structure | None) -> None:
    service = say("a")
    serve(service).client().chat.completions.create(model=MODEL, messages=HELLO, extra_body=given)
    assert service.seen[0].params.structure == expected
