"""What the engine says back while it works on a request."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Literal

from headrace.core.batch import StepShape
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
    or "error". ``stop_token`` is the id that ended it, when one did; such a token is part of ``tokens``. ``steps`` counts the steps
    after the first token's that brought ``tokens``, ``drafted`` the draft nodes verified in them and ``accepted`` those committed.
    """

    request_id: str
    index: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    reason: FinishReason | None = None
    stop_token: int | None = None
    timing: RequestTiming | None = None
    error: HeadraceError | None = None
    steps: int = 0
    drafted: int = 0
    accepted: int = 0


STEP_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)
STEP_TOKENS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
ACCEPTED = (0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16)
RELATIVE_ERRORS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0)


@dataclass(slots=True)
class Counts:
    """A histogram: how many values were at most each of ``bounds`` (and above the bound before), and how many were above all.

    Attributes:
        bounds: ascending.
        counts: one more than bounds.
        total: the sum of all values.
    """

    bounds: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        if not self.counts:
            self.counts = [0] * (len(self.bounds) + 1)

    def add(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


@dataclass(slots=True)
class EngineStats:
    """A snapshot of the engine for metrics and health.

    Attributes:
        step_ms, forward_ms: of the last step.
        step_seconds, forward_seconds: of all steps.
        predicted_seconds, predicted_steps: what the profile expected of the steps it saw, before it saw them, and how many those
            were; ``observed_seconds`` is what they took.
        profile_error: |predicted / measured - 1| of each of them; ``profile_error_p50`` is the median of the latest, None
            without a profile.
        step_limit: tokens that a step may hold.
        prefill_per_step, decode_per_step, verify_per_step: tokens of each step by purpose: rows of prompts, newest tokens, draft nodes.
        accepted_per_draft: nodes committed of each draft that was verified.
        prefilling: request id -> when it was first scheduled, of those running that have no token yet.
        verifications: decode rows that were roots of drafts or stood alone.
        drafted, accepted: draft nodes verified, and those of them that were committed.
        draft_s, plan_s: seconds spent in drafting and in the policy since the start.
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
    step_limit: int = 0
    prefilling: dict[str, float] = field(default_factory=dict)
    draft_s: float = 0.0
    plan_s: float = 0.0
    step_seconds: Counts = field(default_factory=lambda: Counts(STEP_SECONDS))
    forward_seconds: Counts = field(default_factory=lambda: Counts(STEP_SECONDS))
    prefill_per_step: Counts = field(default_factory=lambda: Counts(STEP_TOKENS))
    decode_per_step: Counts = field(default_factory=lambda: Counts(STEP_TOKENS))
    verify_per_step: Counts = field(default_factory=lambda: Counts(STEP_TOKENS))
    accepted_per_draft: Counts = field(default_factory=lambda: Counts(ACCEPTED))
    predicted_steps: int = 0
    predicted_seconds: float = 0.0
    observed_seconds: float = 0.0
    profile_error: Counts = field(default_factory=lambda: Counts(RELATIVE_ERRORS))
    profile_error_p50: float | None = None

    def count_step(self, seconds: float) -> None:
        """Count a step that took ``seconds``."""
        self.steps += 1
        self.step_ms = seconds * 1e3
        self.step_seconds.add(seconds)

    def count_forward(self, seconds: float, shape: StepShape, drafted: int = 0) -> None:
        """Count the forward of a step of ``shape``, and its tokens, ``drafted`` of which are nodes of drafts."""
        self.forward_ms = seconds * 1e3
        self.forward_seconds.add(seconds)
        self.prefill_tokens += shape.prefill_tokens
        self.decode_tokens += shape.decode_tokens
        self.prefill_per_step.add(shape.prefill_tokens)
        self.decode_per_step.add(shape.decode_tokens - drafted)
        self.verify_per_step.add(drafted)

    def count_draft(self, drafted: int, accepted: int) -> None:
        """Count a draft of ``drafted`` nodes that was verified, and the ``accepted`` ones of them."""
        self.drafted += drafted
        self.accepted += accepted
        self.accepted_per_draft.add(accepted)
