"""Fields to parameters, without a server."""

from __future__ import annotations

import pytest

from headrace.core.errors import InvalidRequest
from headrace.core.request import SamplingParams
from headrace.server.api.sampling import sampling_params
from headrace.server.api.schemas import ChatBody, CompletionBody


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
