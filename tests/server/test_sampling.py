"""Fields to parameters, without a server."""

from __future__ import annotations

import pytest

from headrace.core.errors import InvalidRequest
from headrace.core.request import SLO, SamplingParams
from headrace.server.sampling import parse_slo_header, resolve_slo, sampling_params
from headrace.server.schemas import ChatBody, CompletionBody


def chat(**fields) -> ChatBody:
    return ChatBody.model_validate({"messages": [{"role": "user", "content": "a"}], **fields})


def test_defaults_are_those_of_the_core() -> None:
    assert sampling_params(chat(), 9) == SamplingParams(max_tokens=9)
    assert sampling_params(CompletionBody(prompt="a"), 9) == SamplingParams(max_tokens=9)


def test_zero_is_not_taken_for_absent() -> None:
    params = sampling_params(chat(temperature=0, seed=0, min_p=0, logprobs=True, top_logprobs=0), 1)
    assert params.greedy
    assert (params.seed, params.logprobs) == (0, 0)
    assert sampling_params(CompletionBody(prompt="a", logprobs=0), 1).logprobs == 0


@pytest.mark.parametrize("stop", ["END", ["END"]])
def test_stop_as_text_or_list(stop) -> None:
    assert sampling_params(chat(stop=stop), 1).stop == ("END",)


def test_empty_stop_list_is_none() -> None:
    assert sampling_params(chat(stop=[]), 1).stop == ()


@pytest.mark.parametrize("key", ["-1", "1.5", "", "x", "٣", "99999999999", " 1", "+1", "1_0"])
def test_bias_keys(key: str) -> None:
    with pytest.raises(InvalidRequest, match="logit_bias"):
        sampling_params(chat(logit_bias={key: 1}), 1)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (None, {}),
        ("", {}),
        ("ttft_ms=200", {"ttft_ms": 200}),
        ("ttft_ms=200,tpot_ms=50", {"ttft_ms": 200, "tpot_ms": 50}),
        (" tpot_ms=0.5 ,", {"tpot_ms": 0.5}),
    ],
)
def test_header(header, expected) -> None:
    assert parse_slo_header(header) == expected


@pytest.mark.parametrize(
    "header", ["x", "ttft=1", "ttft_ms=-1", "ttft_ms=0", "ttft_ms=1e9", "ttft_ms=nan", "ttft_ms=1;tpot_ms=2"]
)
def test_bad_header(header: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_slo_header(header)
    assert caught.value.field == "X-Headrace-SLO"


def test_precedence_body_header_tier() -> None:
    tiers = {"fast": SLO(1, 2)}
    known = ("default", "fast")

    def resolve(header=None, **fields) -> SLO:
        return resolve_slo(chat(**fields), header, tiers, known)

    assert resolve() == SLO()
    assert resolve(service_tier="default") == SLO()
    assert resolve(service_tier="fast") == SLO(1, 2)
    assert resolve("ttft_ms=3", service_tier="fast") == SLO(3, 2)
    assert resolve("ttft_ms=3,tpot_ms=4", service_tier="fast", slo={"tpot_ms": 5}) == SLO(3, 5)
    with pytest.raises(InvalidRequest, match="default, fast"):
        resolve(service_tier="fsat")


def test_structure_needs_a_schema_object() -> None:
    for broken in ("[1]", "3", "{", "[" * 5000):
        with pytest.raises(InvalidRequest) as caught:
            sampling_params(chat(guided_json=broken), 1)
        assert caught.value.field == "guided_json"
    with pytest.raises(InvalidRequest):
        sampling_params(chat(structured_outputs={}), 1)
    with pytest.raises(InvalidRequest):
        sampling_params(chat(guided_choice=[]), 1)
