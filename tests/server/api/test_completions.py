"""Text completions through the official client."""

from __future__ import annotations

import json

import openai
import pytest
from tests.server.conftest import Serve
from tests.server.fake_service import MODEL, FakeService

from headrace.server.api.replies import CompletionReply


def test_prompt_forms(serve: Serve) -> None:
    client = serve().client()

    def texts(prompt) -> list[str]:
        return [choice.text for choice in client.completions.create(model=MODEL, prompt=prompt).choices]

    assert texts("abc") == ["abc"]
    assert texts(["abc", "def"]) == ["abc", "def"]
    assert texts([97, 98]) == ["ab"]
    assert texts([[97], [98, 99]]) == ["a", "bc"]


def test_order_of_choices(serve: Serve) -> None:
    service = FakeService(say=lambda request, index: bytes(request.prompt) + b"%d" % index)
    answer = serve(service).client().completions.create(model=MODEL, prompt=["a", "b", "c"], n=2)
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert [choice.text for choice in answer.choices] == ["a0", "a1", "b0", "b1", "c0", "c1"]
    assert answer.usage.prompt_tokens == 3
    assert answer.usage.prompt_tokens_details.cached_tokens == 9  # three a prompt, not three a choice


def test_answer_has_every_field(serve: Serve) -> None:
    raw = serve().client().completions.with_raw_response.create(model=MODEL, prompt="abc", logprobs=1)
    CompletionReply.model_validate(json.loads(raw.content))
    assert json.loads(raw.content)["id"].startswith("cmpl-")


def test_echo(serve: Serve) -> None:
    client = serve().client()
    assert client.completions.create(model=MODEL, prompt="abc", echo=True).choices[0].text == "abcabc"
    assert client.completions.create(model=MODEL, prompt=[97, 98], echo=True).choices[0].text == "abab"
    streamed = client.completions.create(model=MODEL, prompt="abc", echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == "abcabc"


def test_default_and_explicit_max_tokens(serve: Serve) -> None:
    service = FakeService(say=lambda request, index: b"x" * 50, context=40)
    client = serve(service).client()
    assert len(client.completions.create(model=MODEL, prompt="a").choices[0].text) == 16
    assert len(client.completions.create(model=MODEL, prompt="a" * 30).choices[0].text) == 10  # what fits
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="a" * 30, max_tokens=11)
    assert caught.value.param == "max_tokens"
    assert "41" in caught.value.message
    assert "40" in caught.value.message


def test_logprobs(serve: Serve) -> None:
    service = FakeService(say=lambda request, index: "hé!".encode())
    client = serve(service).client()
    found = client.completions.create(model=MODEL, prompt="a", logprobs=1).choices[0].logprobs
    assert found.tokens == ["h", "bytes:\\xc3", "bytes:\\xa9", "!", "<|end|>"]
    assert found.text_offset == [0, 1, 1, 2, 3]
    assert found.token_logprobs == [-1.25] * 5
    assert found.top_logprobs[0] == {"i": -0.5, "h": -1.25}  # the chosen token is always there
    assert client.completions.create(model=MODEL, prompt="a", logprobs=0).choices[0].logprobs.top_logprobs[0] == {
        "h": -1.25
    }
    assert client.completions.create(model=MODEL, prompt="a").choices[0].logprobs is None


def test_streamed_logprobs_are_those_of_the_whole(serve: Serve) -> None:
    service = FakeService(say=lambda request, index: "ha§llo wörld".encode())
    client = serve(service).client()
    whole = client.completions.create(model=MODEL, prompt="a", logprobs=2).choices[0].logprobs
    parts = [chunk.choices[0] for chunk in client.completions.create(model=MODEL, prompt="a", logprobs=2, stream=True)]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [item for part in parts for item in getattr(part.logprobs, name)] == getattr(whole, name)


BAD = {
    "suffix": {"suffix": "end"},
    "best_of": {"best_of": 2},
    "echo": {"echo": True, "logprobs": 1},
    "logprobs": {"logprobs": 21},
    "prompt_logprobs": {"prompt_logprobs": 1},
}


@pytest.mark.parametrize("param", BAD)
def test_refusals_name_the_field(serve: Serve, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        serve().client().completions.create(model=MODEL, prompt="a", extra_body=BAD[param])
    assert caught.value.param == param
    assert param in caught.value.message


@pytest.mark.parametrize(
    "prompt", [[], "", [[]], ["a", ""], [-1], [1 << 40], [99999], [["a"]], ["a", 1], {"a": 1}, None, 5]
)
def test_bad_prompts(serve: Serve, prompt) -> None:
    reply = serve().http().post("/v1/completions", json={"model": MODEL, "prompt": prompt})
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == "prompt"


def test_too_many_choices(serve: Serve) -> None:
    service = FakeService()
    running = serve(service, max_choices=8)
    with pytest.raises(openai.BadRequestError, match="at most 8"):
        running.client().completions.create(model=MODEL, prompt=["a"] * 3, n=3)
    assert len(running.client().completions.create(model=MODEL, prompt=["a"] * 4, n=2).choices) == 8


def test_best_of_one_is_no_change(serve: Serve) -> None:
    assert serve().client().completions.create(model=MODEL, prompt="a", best_of=1).choices[0].text == "a"
