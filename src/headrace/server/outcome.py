"""What became of a request: tokens, latencies, targets. Pure; feeds ``usage`` and the metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from headrace.core.outputs import RequestTiming
from headrace.core.request import SLO


@dataclass(slots=True)
class Outcome:
    """One HTTP request's sums over its prompts and choices.

    ``timings`` are those of the choices that got a token; ``finish_reasons`` has one word per choice ("stop", "length",
    "error", "cancelled"); ``tier`` is the name under which attainment is counted.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    slo: SLO
    tier: str = "none"
    timings: Sequence[RequestTiming] = ()
    finish_reasons: Sequence[str] = field(default_factory=tuple)

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

    def usage(self) -> dict[str, Any]:
        """OpenAI's ``usage`` with our ``slo``."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "slo": {
                "ttft_ms": self.slo.ttft_ms,
                "tpot_ms": self.slo.tpot_ms,
                "achieved": {"ttft_ms": _rounded(self.ttft_ms), "tpot_ms": _rounded(self.tpot_ms)},
                "met": self.met,
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
