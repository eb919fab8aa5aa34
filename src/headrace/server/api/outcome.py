"""What became of a request: tokens, latencies, targets, drafts. Pure; feeds ``usage``, the metrics and the dashboard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from headrace.core.outputs import RequestTiming
from headrace.core.request import SLO


@dataclass(slots=True)
class Outcome:
    """One HTTP request's sums over its prompts and choices.

    Attributes:
        prompt_tokens, completion_tokens, cached_tokens: of the prompts, of the answers, and of the prompts as found in the cache.
        slo: the targets.
        slo_class: the name under which attainment is counted.
        timings: of the choices that got a token.
        finish_reasons: one word per choice ("stop", "length", "error", "cancelled").
        steps: decode steps of all choices; each brought at least one token.
        drafted, accepted: draft nodes verified for it, and those of them that became part of an answer.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    slo: SLO
    slo_class: str = "none"
    timings: Sequence[RequestTiming] = ()
    finish_reasons: Sequence[str] = field(default_factory=tuple)
    steps: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def complete(self) -> bool:
        """True when every choice came to its proper end."""
        return all(reason in ("stop", "length") for reason in self.finish_reasons)

    @property
    def ttft_ms(self) -> float | None:
        """The latest first token of the choices."""
        return self._worst(lambda timing: timing.ttft_ms)

    @property
    def tpot_ms(self) -> float | None:
        """The slowest choice's time per token."""
        return self._worst(lambda timing: timing.tpot_ms)

    def _worst(self, of: Callable[[RequestTiming], float | None]) -> float | None:
        return max((value for timing in self.timings if (value := of(timing)) is not None), default=None)

    @property
    def met(self) -> bool | None:
        """Whether the targets were met; None without targets. An answer of one token has no TPOT to miss."""
        return self.slo.met_by(self.ttft_ms, self.tpot_ms)

    @property
    def attained(self) -> bool | None:
        """What attainment counts: :attr:`met`, but an answer that failed is a miss, and one its client gave up counts only (as a
        miss) when its first token was late already."""
        if self.complete or self.met is None:
            return self.met
        if "error" in self.finish_reasons:
            return False
        late = self.slo.ttft_ms is not None and self.ttft_ms is not None and self.ttft_ms > self.slo.ttft_ms
        return False if late else None

    @property
    def tokens_per_step(self) -> float | None:
        """Tokens committed per decode step and sequence, first tokens excluded; 1 without accepted drafts."""
        return None if self.steps == 0 else (self.completion_tokens - len(self.timings)) / self.steps

    def slack(self) -> dict[str, float]:
        """Target ("ttft", "tpot") -> seconds by which the last of its tokens came before (below 0: after) its deadline.

        For TPOT the deadline of the last token is the first token's time plus the target for every token after it; the worst
        choice counts.
        """
        found: dict[str, float] = {}
        if self.slo.ttft_ms is not None and self.ttft_ms is not None:
            found["ttft"] = (self.slo.ttft_ms - self.ttft_ms) / 1e3
        if self.slo.tpot_ms is not None:
            spare = [
                (self.slo.tpot_ms - timing.tpot_ms) * (timing.decoded - 1) / 1e3
                for timing in self.timings
                if timing.tpot_ms is not None
            ]
            if spare:
                found["tpot"] = min(spare)
        return found

    def usage(self) -> dict[str, Any]:
        """OpenAI's ``usage`` with our ``slo`` and ``speculation``."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "slo": {
                "class": self.slo_class,
                "ttft_ms": self.slo.ttft_ms,
                "tpot_ms": self.slo.tpot_ms,
                "achieved": {"ttft_ms": _rounded(self.ttft_ms), "tpot_ms": _rounded(self.tpot_ms)},
                "met": self.met,
            },
            "speculation": {
                "steps": self.steps,
                "drafted_tokens": self.drafted,
                "accepted_tokens": self.accepted,
                "tokens_per_step": _rounded(self.tokens_per_step),
            },
        }

    def note(self, request_id: str) -> str:
        """What the access log says of the request."""
        times = [("ttft", self.ttft_ms), ("tpot", self.tpot_ms)]
        said = " ".join(f"{name}={value:.1f}ms" for name, value in times if value is not None)
        reasons = ",".join(sorted(set(self.finish_reasons)))
        return f"{request_id} prompt={self.prompt_tokens} generated={self.completion_tokens} {said} {reasons}"


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
