"""A slow, plain sampler in float64: every rule written down once, nothing shared with the real one but the random numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from headrace.core.request import SamplingParams


def processed(
    logits: Sequence[float],
    params: SamplingParams,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    banned: Sequence[int] = (),
) -> list[float]:
    """Penalties, bias and bans."""
    row = [float(x) for x in logits]
    counts = Counter(output)
    for token in set(prompt) | set(output):
        row[token] = (
            row[token] / params.repetition_penalty if row[token] > 0 else row[token] * params.repetition_penalty
        )
    for token, count in counts.items():
        row[token] -= params.frequency_penalty * count + params.presence_penalty
    for token, bias in params.logit_bias.items():
        row[token] += bias
    for token in banned:
        row[token] = -math.inf
    return row


def distribution(row: Sequence[float], params: SamplingParams) -> list[float]:
    """Probabilities after temperature, min-p, top-k, top-p (in this order, each over what the one before left)."""
    peak = max(row)
    if params.temperature == 0:
        best = row.index(peak)
        return [float(i == best) for i in range(len(row))]
    p = [math.exp((x - peak) / params.temperature) for x in row]
    p = [x if x >= params.min_p * max(p) else 0.0 for x in p]
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))
    if params.top_k > 0:
        for i in order[params.top_k :]:
            p[i] = 0.0
    total = math.fsum(p)
    p = [x / total for x in p]
    if params.top_p < 1:
        mass = 0.0
        for i in order:
            if mass >= params.top_p:
                p[i] = 0.0
            mass += p[i]
    total = math.fsum(p)
    return [x / total for x in p]


def pick(p: Sequence[float], u: float) -> tuple[int, float]:
    """The token at ``u`` and how far ``u`` is from the nearest border of its interval."""
    low = 0.0
    for token, share in enumerate(p):
        if share and u < low + share:
            return token, min(u - low, low + share - u)
        low += share
    last = max(i for i, share in enumerate(p) if share)
    return last, 0.0
