"""What the server answers, as models for the OpenAPI document. Answers themselves are built as plain dictionaries, which is
much faster on a stream of tokens; the tests hold them against these models."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class ErrorDetail(BaseModel):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """Any answer from 400 up."""

    error: ErrorDetail


class PromptDetails(BaseModel):
    """What the prompt's tokens cost."""

    cached_tokens: int


class Achieved(BaseModel):
    """Latencies a request has seen, in milliseconds; the worst of its choices."""

    ttft_ms: float | None
    tpot_ms: float | None


class SLOReport(BaseModel):
    """The class they come from, targets, what was achieved, and whether that is within them (null without targets)."""

    model_config = ConfigDict(serialize_by_alias=True)

    class_: str = Field(alias="class")
    ttft_ms: float | None
    tpot_ms: float | None
    achieved: Achieved
    met: bool | None


class SpeculationReport(BaseModel):
    """Decode steps, draft nodes verified and accepted, and tokens per decode step (null before there was one)."""

    steps: int
    drafted_tokens: int
    accepted_tokens: int
    tokens_per_step: float | None


class Usage(BaseModel):
    """OpenAI's usage with our ``slo`` and ``speculation``."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    slo: SLOReport
    speculation: SpeculationReport


class TopLogprob(BaseModel):
    """One alternative."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """The chosen token and its alternatives."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities in chat form."""

    content: list[TokenLogprob] | None
    refusal: None = None


class AssistantMessage(BaseModel):
    """The answer's message."""

    role: Literal["assistant"]
    content: str | None
    refusal: None = None


class ChatChoice(BaseModel):
    """One of ``n`` answers."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: int | str | None


class ChatReply(BaseModel):
    """POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    service_tier: str | None
    choices: list[ChatChoice]
    usage: Usage


class CompletionLogprobs(BaseModel):
    """Log-probabilities in the older form; the four lists are parallel."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One continuation."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: int | str | None


class CompletionReply(BaseModel):
    """POST /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    service_tier: str | None
    choices: list[CompletionChoice]
    usage: Usage


class QualityObject(BaseModel):
    """What quantisation costs on a built-in text: mean negative log-likelihoods in nats, and equal likeliest tokens."""

    tokens: int
    nll_before: float
    nll: float
    same_greedy: float


class ModelObject(BaseModel):
    """A served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    max_model_len: int
    parameters: int
    dtype: str
    quantization: str | None = None
    kv_cache_dtype: str | None = None
    quality: QualityObject | None = None


class ModelList(BaseModel):
    """GET /v1/models."""

    object: Literal["list"]
    data: list[ModelObject]


class TokenizeReply(BaseModel):
    """POST /tokenize."""

    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: list[str] | None


class DetokenizeReply(BaseModel):
    """POST /detokenize."""

    prompt: str


class HealthReply(BaseModel):
    """GET /health."""

    state: Literal["loading", "ready", "draining", "failed"]
    model: str | None
    version: str


class VersionReply(BaseModel):
    """GET /version."""

    version: str


_TEXTS = {
    400: "The request is not valid.",
    401: "The API key is missing or wrong.",
    404: "There is no such model.",
    408: "The body took too long to arrive.",
    413: "The body is too large.",
    415: "The body is not application/json.",
    429: "Too many requests wait; try again after `Retry-After` seconds.",
    500: "A defect of the server.",
    503: "The model is loading, the server is draining, or the engine has failed.",
}


def error_replies(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The ``responses`` of a route that may answer with ``statuses``."""
    return {status: {"model": ErrorReply, "description": _TEXTS[status]} for status in statuses}


def or_stream(kind: str) -> dict[str, Any]:
    """The 200 of a route that answers with an object, or with server-sent events when ``stream`` is set."""
    text = f"A `{kind}` object as JSON text, an `error` object, or `[DONE]` at the end; sent when `stream` is true."
    event = {"type": "object", "properties": {"data": {"type": "string", "description": text}}, "required": ["data"]}
    return {"description": "The answer.", "content": {"text/event-stream": {"itemSchema": event}}}
