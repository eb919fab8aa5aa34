"""What :class:`headrace.LLM` gives back; shapes and names are vLLM's."""

from __future__ import annotations

from dataclasses import dataclass, field

from headrace.core.outputs import FinishReason


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token at one position: natural-log probability, 1-based rank among all tokens and its text."""

    logprob: float
    rank: int
    decoded_token: str


@dataclass(slots=True)
class CompletionOutput:
    """One answer.

    ``logprobs`` has one mapping per token, from token id to :class:`Logprob`, with the chosen token among them.
    ``stop_reason`` is the stop string or the stop token id that ended it, None for the model's own end of text.
    ``error`` says what went wrong where ``finish_reason`` is "error"; the text is what came before.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None


@dataclass(slots=True)
class RequestMetrics:
    """How a request was served: milliseconds to the first token and per decoded token (the slowest of its answers),
    prompt tokens found in the prefix cache, preemptions, and whether its SLO was met (None: it had none)."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    cached_tokens: int = 0
    preemptions: int = 0
    slo_met: bool | None = None


@dataclass(slots=True)
class RequestOutput:
    """Everything about one prompt. ``prompt`` is None where token ids were given."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
