"""What a client asks for: sampling parameters, latency targets, structure, and the request itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Literal

from headrace.core.errors import InvalidRequest
from headrace.core.retrieval import Retrieval

StructureKind = Literal["json_schema", "json_object", "regex", "choice", "ebnf"]

MAX_LOGPROBS = 20
MAX_N = 128
MAX_LOGIT_BIAS = 300


@dataclass(frozen=True, slots=True)
class SLO:
    """Latency targets of one request, both in milliseconds; None means no target.

    ``ttft_ms`` bounds arrival to first token; ``tpot_ms`` bounds decode time / decoded tokens, the first
    token excluded.
    """

    ttft_ms: float | None = None
    tpot_ms: float | None = None

    def __post_init__(self) -> None:
        for name in ("ttft_ms", "tpot_ms"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InvalidRequest(
                    f"slo.{name} is {value!r}: give milliseconds above 0, or leave it out", field=f"slo.{name}"
                )

    def __str__(self) -> str:
        """The targets for a person, such as "first token in 1000 ms, 50 ms a token"."""
        ttft = [] if self.ttft_ms is None else [f"first token in {self.ttft_ms:g} ms"]
        tpot = [] if self.tpot_ms is None else [f"{self.tpot_ms:g} ms a token"]
        return ", ".join(ttft + tpot) or "no target"

    def met_by(self, ttft_ms: float | None, tpot_ms: float | None) -> bool | None:
        """Whether measured latencies meet the targets; None without targets.

        ``ttft_ms`` None means that no token came, which meets nothing; a single token has no TPOT to miss.
        """
        if self.ttft_ms is None and self.tpot_ms is None:
            return None
        if ttft_ms is None:
            return False
        in_time = self.ttft_ms is None or ttft_ms <= self.ttft_ms
        return in_time and (self.tpot_ms is None or tpot_ms is None or tpot_ms <= self.tpot_ms)


@dataclass(frozen=True, slots=True)
class Structure:
    """A grammar the answer must obey.

    ``spec`` is a JSON schema as text for ``json_schema``, a pattern for ``regex``, a grammar for ``ebnf``, the
    alternatives as a JSON array for ``choice`` and unused for ``json_object``.
    """

    kind: StructureKind
    spec: str = ""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to turn logits into tokens and when to stop; field names are vLLM's.

    Attributes:
        n: sequences per prompt (each with its own random stream).
        temperature: 0 is greedy.
        top_p, top_k, min_p: nucleus mass in (0, 1], candidates (0 or -1: all), share of the top probability.
        repetition_penalty: divides positive and multiplies negative logits of tokens seen in prompt or output.
        presence_penalty, frequency_penalty: subtracted from logits of tokens seen in the output (OpenAI's form).
        logit_bias: token id -> value added to its logit.
        seed: with it, output repeats exactly in any batch; without, one is drawn per request.
        stop, stop_token_ids: end generation; the stop string is cut from the text unless ``include_stop``.
        min_tokens, max_tokens: bounds on generated tokens; ``max_tokens=None`` runs to the context's end.
        ignore_eos: do not stop at the model's end-of-text tokens.
        logprobs: None for none, else the number (0..20) of alternatives beside each chosen token.
        structure: a grammar for the answer.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop: bool = False
    min_tokens: int = 0
    max_tokens: int | None = 16
    ignore_eos: bool = False
    logprobs: int | None = None
    structure: Structure | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        _in_range("n", self.n, 1, MAX_N, whole=True)
        _in_range("temperature", self.temperature, 0.0, 100.0)
        _in_range("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _in_range("top_k", self.top_k, -1, 1 << 31, whole=True)
        _in_range("min_p", self.min_p, 0.0, 1.0)
        _in_range("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_low=True)
        _in_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _in_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _in_range("min_tokens", self.min_tokens, 0, 1 << 31, whole=True)
        if self.max_tokens is not None:
            _in_range("max_tokens", self.max_tokens, 1, 1 << 31, whole=True)
            if self.min_tokens > self.max_tokens:
                raise InvalidRequest(
                    f"min_tokens is {self.min_tokens}, above max_tokens {self.max_tokens}: lower it", field="min_tokens"
                )
        if self.logprobs is not None:
            _in_range("logprobs", self.logprobs, 0, MAX_LOGPROBS, whole=True)
        if self.seed is not None:
            _in_range("seed", self.seed, -(1 << 63), (1 << 63) - 1, whole=True)
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise InvalidRequest(
                f"logit_bias has {len(self.logit_bias)} entries: at most {MAX_LOGIT_BIAS}", field="logit_bias"
            )
        for token, bias in self.logit_bias.items():
            _in_range(f"logit_bias[{token}]", bias, -100.0, 100.0)
        for name, ids in (("logit_bias", self.logit_bias), ("stop_token_ids", self.stop_token_ids)):
            for token in ids:
                if not isinstance(token, Integral):
                    raise InvalidRequest(
                        f"{name} holds {token!r:.60}: give token ids, which are whole numbers", field=name
                    )
        if any(not isinstance(text, str) for text in self.stop):
            raise InvalidRequest(
                "stop holds something that is no string: give a string or a list of them", field="stop"
            )
        if any(not text for text in self.stop):
            raise InvalidRequest("stop holds an empty string: leave it out", field="stop")

    @property
    def greedy(self) -> bool:
        """True when the most likely token is always taken."""
        return self.temperature == 0.0

    def with_(self, **changes: object) -> SamplingParams:
        """A copy with some fields changed, checked again."""
        return replace(self, **changes)  # type: ignore[arg-type]


def _in_range(name: str, value: float, low: float, high: float, *, open_low: bool = False, whole: bool = False) -> None:
    """Raise :class:`InvalidRequest` unless ``low <= value <= high`` (``low < value`` with ``open_low``; an int with ``whole``)."""
    good = isinstance(value, Integral) or (isinstance(value, Real) and not whole and math.isfinite(value))
    if not good or isinstance(value, bool) or value > high or value < low or (open_low and value <= low):
        bound = f"above {low:g} and at most {high:g}" if open_low else f"from {low:g} to {high:g}"
        raise InvalidRequest(f"{name} is {value!r:.60}: give a {'whole ' if whole else ''}number {bound}", field=name)


@dataclass(frozen=True, slots=True)
class Request:
    """One thing a client asked for, as token ids. Times are seconds on the engine's clock.

    Attributes:
        id: unique among live requests.
        prompt: token ids, at least one.
        params: sampling parameters, with ``max_tokens`` and ``seed`` resolved by whoever submits.
        priority: lower runs sooner (vLLM's convention).
        slo: latency targets, measured and reported whatever the policy does with them.
        tier: the service class named by the client, or None.
        arrival: when the client's request reached us; 0.0 lets the engine stamp it.
        cache_salt: requests share cached prefixes only under the same salt.
        owner: who pays (an API key's label), for fair sharing; never the key itself.
        kv: how decode steps read the context; None leaves it to the engine.
        speculate: True drafts for this request wherever drafts can be had, False never does, None leaves it to the policy.
    """

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    priority: int = 0
    slo: SLO = field(default_factory=SLO)
    tier: str | None = None
    arrival: float = 0.0
    cache_salt: str = ""
    owner: str = ""
    speculate: bool | None = None
    kv: Retrieval | None = None
