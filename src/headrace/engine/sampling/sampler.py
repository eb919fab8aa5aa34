"""The sampler: one token per draw from the logits of a step.

Order of what is applied to a row, as in vLLM: penalties, bias, grammar, the ban on stop tokens below ``min_tokens``;
then temperature, min-p, top-k, top-p. Each draw reads its own row and nothing else, so its outcome is bitwise the same
in any batch. The arithmetic is numpy on the host: for one row of a vocabulary its partial sorts and exponentials are
several times faster than torch's on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from headrace.core.errors import HeadraceError, InvalidRequest
from headrace.core.outputs import TokenLogprobs
from headrace.core.protocols import StepResult
from headrace.core.request import SamplingParams
from headrace.engine.history import Histories
from headrace.engine.sampling import distribution
from headrace.engine.sampling.distribution import Floats
from headrace.engine.sampling.logprobs import token_logprobs
from headrace.engine.sampling.processors import Grammar, apply_bias, apply_grammar, apply_penalties, ban, penalised
from headrace.engine.sampling.rng import stream_key, uniform

__all__ = ["Draw", "Sampled", "TorchSampler", "is_plain_greedy", "stream_key"]

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: dividing by them would overflow float32."""


@dataclass(slots=True)
class Draw:
    """One token to draw.

    Attributes:
        row: row of ``StepResult.logits``; several draws may share one.
        params: sampling parameters.
        seed: 64-bit stream key of the sequence, see :func:`headrace.engine.sampling.rng.stream_key`.
        index: absolute index of the token among the generated ones, 0 for the first.
        prompt, output: the tokens so far, for penalties. The same list objects must come back for a sequence, with
            ``output`` appended to in place.
        stop_ids: the model's end-of-text ids and ``stop_token_ids``, banned while ``index < params.min_tokens``.
        grammar: the state of the sequence's grammar, or None.
    """

    row: int
    params: SamplingParams
    seed: int
    index: int
    prompt: Sequence[int] = ()
    output: list[int] = field(default_factory=list)
    stop_ids: tuple[int, ...] = ()
    grammar: Grammar | None = None


@dataclass(slots=True)
class Sampled:
    """The outcome of a draw: a token with its log-probabilities when asked for, or what went wrong (``token`` is then -1)."""

    token: int
    logprobs: TokenLogprobs | None = None
    error: HeadraceError | None = None


class TorchSampler:
    """Draws tokens; see the module's text for the rules. Not thread-safe (buffers are reused)."""

    def __init__(self) -> None:
        self._scratch = distribution.Scratch()
        self._histories = Histories()

    def sample(self, result: StepResult, rows: Sequence[Draw]) -> list[Sampled]:
        """One outcome per draw, in order. A row of bad logits fails alone."""
        if not rows:
            return []
        self._histories.begin_step()
        logits: torch.Tensor = result.logits
        if logits.device.type == "cpu":
            values = logits.detach().to(torch.float32).numpy()
            return [self._one(values[draw.row], draw) for draw in rows]
        return self._from_device(logits.detach(), rows)

    def _from_device(self, logits: torch.Tensor, draws: Sequence[Draw]) -> list[Sampled]:
        """Plain greedy draws are settled on the device; only the rows of the others are copied."""
        greedy = [draw.row for draw in draws if is_plain_greedy(draw)]
        others = sorted({draw.row for draw in draws if not is_plain_greedy(draw)})
        settled: dict[int, Sampled] = {}
        if greedy:
            peaks, ids = _select(logits, greedy).max(dim=-1)
            ids = torch.where(torch.isfinite(peaks), ids, -1)
            settled = {
                row: Sampled(token) if token >= 0 else _bad_logits()
                for row, token in zip(greedy, ids.tolist(), strict=True)
            }
        values = _select(logits, others).to(torch.float32).cpu().numpy() if others else None
        places = {row: place for place, row in enumerate(others)}
        return [
            settled[draw.row] if values is None or is_plain_greedy(draw) else self._one(values[places[draw.row]], draw)
            for draw in draws
        ]

    def _one(self, raw: Floats, draw: Draw) -> Sampled:
        if is_plain_greedy(draw):
            token = int(raw.argmax())  # a NaN counts as the maximum
            return Sampled(token) if math.isfinite(raw[token]) else _bad_logits()
        params = draw.params
        if not math.isfinite(raw.max()):
            return _bad_logits()
        try:
            row = self._processed(raw, draw)
        except HeadraceError as error:
            return Sampled(-1, error=error)
        token = self._pick(row, draw)
        if token < 0:
            return _nothing_allowed()
        if params.logprobs is None:
            return Sampled(token)
        return Sampled(token, token_logprobs(raw, token, params.logprobs))

    def _processed(self, raw: Floats, draw: Draw) -> Floats:
        """The edited row: a copy, or ``raw`` itself when nothing changes."""
        params = draw.params
        penalties, banned = penalised(params), draw.index < params.min_tokens and draw.stop_ids
        if not (penalties or banned or params.logit_bias or draw.grammar is not None):
            return raw
        row = raw.copy()
        if penalties:
            apply_penalties(row, self._histories.get(draw.prompt, draw.output), params)
        if params.logit_bias:
            apply_bias(row, params.logit_bias)
        if draw.grammar is not None:
            apply_grammar(row, draw.grammar)
        if banned:
            ban(row, draw.stop_ids)
        return row

    def _pick(self, row: Floats, draw: Draw) -> int:
        """The drawn id, or -1 when every token is ruled out."""
        params = draw.params
        best = int(row.argmax())
        peak = float(row[best])
        if not math.isfinite(peak):
            return -1
        if params.temperature < GREEDY_BELOW or params.top_k == 1:
            return best
        weights, padded = self._scratch.take(len(row))
        distribution.softmax_weights(row, peak, params.temperature, weights)
        if params.top_p < 1.0 or params.top_k > 0 or params.min_p > 0.0:
            distribution.truncate(weights, params.top_k, params.top_p, params.min_p)
        return distribution.draw(padded, uniform(draw.seed, draw.index))


def is_plain_greedy(draw: Draw) -> bool:
    """Whether the draw is the largest raw logit and nothing more is asked of it."""
    params = draw.params
    return (
        params.temperature < GREEDY_BELOW
        and params.logprobs is None
        and draw.grammar is None
        and not params.logit_bias
        and not penalised(params)
        and (draw.index >= params.min_tokens or not draw.stop_ids)
    )


def _select(logits: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """The named rows, without a copy when they are all of them in order."""
    if len(rows) == len(logits) and all(i == row for i, row in enumerate(rows)):
        return logits
    return logits[torch.tensor(rows, device=logits.device)]


def _bad_logits() -> Sampled:
    return Sampled(
        -1,
        error=HeadraceError(
            "the model produced logits that are NaN or infinite for this request: its weights or its dtype are at fault; "
            "try dtype float32, or another checkpoint",
            code="invalid_logits",
        ),
    )


def _nothing_allowed() -> Sampled:
    return Sampled(
        -1,
        error=InvalidRequest(
            "no token of the vocabulary is allowed here: the grammar has no continuation; loosen response_format",
            field="response_format",
        ),
    )
