"""From a request's fields to sampling parameters and structure. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from headrace.core.errors import InvalidRequest
from headrace.core.request import SamplingParams, Structure
from headrace.engine.structured.grammar import field_of, validate
from headrace.server.api.schemas import ChatBody, CompletionBody, GenerationBody, ResponseFormat, StructuredOutputs

_SAME_NAME = (
    "n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed",
    "stop", "stop_token_ids", "min_tokens", "ignore_eos", "skip_special_tokens",
)  # fmt: skip
_LARGEST_ID = 1 << 31


def sampling_params(body: ChatBody | CompletionBody, max_tokens: int | None) -> SamplingParams:
    """The sampling parameters of ``body``; raises :class:`InvalidRequest` naming the field."""
    given: dict[str, Any] = {
        name: value for name in _SAME_NAME if (value := getattr(body, name)) is not None and value != []
    }
    if isinstance(body.stop, list):
        given["stop"] = tuple(body.stop)
    return SamplingParams(
        **given,
        max_tokens=max_tokens,
        logit_bias=_logit_bias(body.logit_bias or {}),
        include_stop=bool(body.include_stop_str_in_output),
        logprobs=_logprobs(body),
        structure=structure(body),
    )


def _logprobs(body: ChatBody | CompletionBody) -> int | None:
    if isinstance(body, CompletionBody):
        return body.logprobs
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs: true", field="top_logprobs")
    return (body.top_logprobs or 0) if body.logprobs else None


def _logit_bias(given: Mapping[str, float]) -> dict[int, float]:
    biases = {}
    for key, value in given.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10 and int(key) < _LARGEST_ID):
            raise InvalidRequest('logit_bias: keys are token ids, such as "42"', field="logit_bias")
        biases[int(key)] = value
    return biases


def structure(body: GenerationBody) -> Structure | None:
    """The grammar the answer must obey, from whichever field gives one; raises when two do."""
    found = {
        "response_format": _of_response_format(body.response_format),
        "structured_outputs": _of_structured_outputs(body.structured_outputs),
        "guided_json": _json_schema(body.guided_json, "guided_json"),
        "guided_regex": None if body.guided_regex is None else Structure("regex", body.guided_regex),
        "guided_choice": _choice(body.guided_choice, "guided_choice"),
        "guided_grammar": None if body.guided_grammar is None else Structure("ebnf", body.guided_grammar),
    }
    given = {name: value for name, value in found.items() if value is not None}
    if len(given) > 1:
        names = " and ".join(given)
        raise InvalidRequest(f"{names} both constrain the answer: give one of them", field=list(given)[-1])
    for name, found_one in given.items():
        _check_structure(found_one, name)
    return next(iter(given.values()), None)


def _check_structure(structure: Structure, field: str) -> None:
    """Refuse now what the engine would refuse later, under the name that the client used."""
    try:
        validate(structure)
    except InvalidRequest as error:
        raise InvalidRequest(error.message.replace(field_of(structure), field, 1), field=field) from error


def _of_response_format(given: ResponseFormat | None) -> Structure | None:
    if given is None or given.type == "text":
        return None
    if given.type == "json_object":
        return Structure("json_object")
    if given.json_schema is None or given.json_schema.schema_ is None:
        raise InvalidRequest("response_format of type json_schema needs json_schema.schema", field="response_format")
    return _json_schema(given.json_schema.schema_, "response_format")


def _of_structured_outputs(given: StructuredOutputs | None) -> Structure | None:
    if given is None:
        return None
    name = "structured_outputs"
    found = [
        _json_schema(given.json_, name),
        Structure("json_object") if given.json_object else None,
        None if given.regex is None else Structure("regex", given.regex),
        _choice(given.choice, name),
        None if given.grammar is None else Structure("ebnf", given.grammar),
    ]
    given_ones = [item for item in found if item is not None]
    if len(given_ones) != 1:
        raise InvalidRequest(f"{name} needs exactly one of json, json_object, regex, choice and grammar", field=name)
    return given_ones[0]


def _json_schema(schema: dict[str, Any] | str | None, field: str) -> Structure | None:
    if schema is None:
        return None
    try:
        if isinstance(schema, str):
            schema = json.loads(schema)
        if not isinstance(schema, dict):
            raise InvalidRequest(f"{field}: a JSON schema is an object", field=field)
        return Structure("json_schema", json.dumps(schema))
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(
            f"{field}: the JSON schema cannot be read ({type(error).__name__})", field=field
        ) from error


def _choice(choices: list[str] | None, field: str) -> Structure | None:
    if choices is None:
        return None
    if not choices or not all(choices):
        raise InvalidRequest(f"{field}: give at least one choice, none of them empty", field=field)
    return Structure("choice", json.dumps(choices))
