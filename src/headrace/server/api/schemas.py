"""What clients may send. Ranges live here so that they appear in the OpenAPI document too.

Fields that OpenAI's API does not have are vLLM's (``top_k``, ``guided_json``, ...) or ours (``slo``). Unknown fields
are accepted and ignored, as vLLM does, so that clients written for other servers work; fields whose silence would change
the meaning of the answer are refused by :mod:`headrace.server.api.refused`. ``null`` always means "not given".
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

from headrace.core.request import MAX_LOGPROBS, MAX_N

INT32 = 1 << 31
INT63 = 1 << 63
MAX_STOPS = 16

MAX_BIASES = 300
MAX_ITEMS = 1 << 20

Item = TypeVar("Item")
Many = Annotated[list[Item], Field(fail_fast=True, max_length=MAX_ITEMS)]
"""A list whose first bad item ends its validation: a body of millions of them must not cost an error object each."""

Token = Annotated[int, Field(ge=0, lt=INT32)]
Tokens = Many[Token]
StopText = Annotated[str, Field(min_length=1, max_length=1000)]


def _few(given: Any) -> Any:
    """Count before looking, for the same reason."""
    if isinstance(given, dict) and len(given) > MAX_BIASES:
        raise ValueError(f"has {len(given)} entries: at most {MAX_BIASES}")
    return given


Biases = Annotated[
    dict[str, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_few), Field(max_length=MAX_BIASES)
]


class Body(BaseModel):
    """Base of every request body."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False, protected_namespaces=())


class SLOTargets(BaseModel):
    """Latency targets in milliseconds."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    ttft_ms: Annotated[float, Field(gt=0, le=1e9)] | None = Field(None, description="Arrival to first token.")
    tpot_ms: Annotated[float, Field(gt=0, le=1e9)] | None = Field(
        None, description="Decode time over decoded tokens, the first token excluded."
    )


class KVWish(BaseModel):
    """How decode steps read a long context: whole ("full"), or the share that an index points at ("pq"; "auto" in long contexts)."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    mode: Literal["full", "pq", "auto"] = "auto"
    budget: float = Field(0.1, gt=0, le=1, description="Share of the context that a step reads.")


TARGETS_TAG, CLASS_TAG = "slo-targets", "slo-class"
"""Parts of an error's path that stand in no client's request."""


def _kind_of_slo(given: Any) -> str:
    return CLASS_TAG if isinstance(given, str) else TARGETS_TAG


SLOField = Annotated[
    Annotated[SLOTargets, Tag(TARGETS_TAG)] | Annotated[str, Field(min_length=1, max_length=64), Tag(CLASS_TAG)],
    Discriminator(_kind_of_slo),
]


def _as_word(given: Any) -> Any:
    """``true`` and ``false`` as YAML reads them."""
    return {True: "on", False: "off"}[given] if isinstance(given, bool) else given


Speculate = Annotated[Literal["on", "off", "auto"], BeforeValidator(_as_word)]


class JsonSchema(Body):
    """The ``json_schema`` of a response format."""

    name: str = "schema"
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """OpenAI's ``response_format``."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(BaseModel):
    """vLLM's ``structured_outputs``; exactly one field is set."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: Many[str] | None = None
    grammar: str | None = None


class StreamOptions(Body):
    """OpenAI's ``stream_options`` and vLLM's ``continuous_usage_stats``."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationBody(Body):
    """Fields that chat and text completions share."""

    model: str | None = Field(None, description="The served model; left out, the one that is served.")
    n: int | None = Field(None, ge=1, le=MAX_N)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=INT32)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Biases | None = None
    seed: int | None = Field(None, ge=-INT63, lt=INT63)
    stop: StopText | Annotated[list[StopText], Field(fail_fast=True, max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[Token], Field(fail_fast=True, max_length=256)] | None = None
    include_stop_str_in_output: bool | None = None
    max_tokens: int | None = Field(None, ge=1, lt=INT32)
    min_tokens: int | None = Field(None, ge=0, lt=INT32)
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Many[str] | None = None
    guided_grammar: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    priority: int | None = Field(None, ge=-INT32, lt=INT32, description="Lower runs sooner.")
    service_tier: str | None = Field(None, max_length=64, description="One of OpenAI's tiers, or a service class.")
    slo: SLOField | None = Field(None, description="Latency targets, or the name of a service class.")
    speculate: Speculate | None = Field(
        None,
        description="Draft for this request wherever drafts can be had (on), never (off), or as the policy sees fit (auto).",
    )
    kv: KVWish | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None


class ContentPart(Body):
    """One part of a message; only text is understood."""

    type: str
    text: str | None = None


class Message(Body):
    """One message of a conversation."""

    role: str = Field(max_length=64)
    content: str | Many[ContentPart] | None = None
    name: str | None = None


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: Annotated[Many[Message], Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1, lt=INT32)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: str | Many[str] | Tokens | Many[Tokens] = Field(
        union_mode="left_to_right",
        description="A text, a list of texts, a list of token ids or a list of such lists.",
    )
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    add_special_tokens: bool | None = None


class TokenizeBody(Body):
    """POST /tokenize: either ``prompt`` or ``messages``."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[Many[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: Tokens
    skip_special_tokens: bool | None = None
