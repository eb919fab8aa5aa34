"""What the engine says back while it works on a request."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from headrace.core.errors import HeadraceError

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(slots=True)
class TokenLogprobs:
    """Log-probabilities at one generated position, natural logarithm, of the raw (unprocessed) target logits.

    ``token`` is the chosen id, ``logprob`` its value, ``rank`` its 1-based rank in the raw distribution and ``top`` the
    most likely ids with their values, best first.
    """

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class RequestTiming:
    """When things happened, in seconds on the engine's clock (None: not yet)."""

    arrival: float
    first_scheduled: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    decoded: int = 0
    cached_tokens: int = 0
    preemptions: int = 0

    @property
    def ttft_ms(self) -> float | None:
        """Arrival to first token, milliseconds."""
        return None if self.first_token is None else (self.first_token - self.arrival) * 1e3

    @property
    def tpot_ms(self) -> float | None:
        """Decode time over decoded tokens, the first token excluded, milliseconds (None below two tokens)."""
        if self.first_token is None or self.last_token is None or self.decoded < 2:
            return None
        return (self.last_token - self.first_token) / (self.decoded - 1) * 1e3


@dataclass(slots=True)
class SequenceDelta:
    """New tokens of one sequence of a request; one step may commit several.

    ``reason`` is set with the last delta of a sequence: "stop" (end-of-text, stop id or completed grammar), "length", "abort"
    or "error". ``stop_token`` is the id that ended it, when one did; such a token is part of ``tokens``.
    """

    request_id: str
    index: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    reason: FinishReason | None = None
    stop_token: int | None = None
    timing: RequestTiming | None = None
    error: HeadraceError | None = None


@dataclass(slots=True)
class EngineStats:
    """A snapshot of the engine for metrics and health.

    ``verifications`` counts decode rows that were roots, ``drafted`` the draft nodes verified below them and ``accepted`` those of them
    that were committed. ``draft_s`` and ``plan_s`` are seconds spent in drafting and in the policy since the start.
    """

    running: int = 0
    waiting: int = 0
    slots_total: int = 0
    slots_free: int = 0
    slots_cached: int = 0
    steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    step_ms: float = 0.0
    forward_ms: float = 0.0
    finished: int = 0
    aborted: int = 0
    verifications: int = 0
    drafted: int = 0
    accepted: int = 0
    draft_s: float = 0.0
    plan_s: float = 0.0
