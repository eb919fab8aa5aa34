"""How deep to draft: the depth that promises the most tokens a millisecond, before there is a draft to look at."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from headrace.core.speculation import Floats, Outlook
from headrace.speculation.policies.step import Step, survival
from headrace.speculation.select import ladder


@dataclass(frozen=True, slots=True)
class Depth:
    """A choice of what to draft. ``depth`` 0 is none; ``rate`` is the tokens a millisecond it promises."""

    depth: int
    source: str
    rate: float


def best_depth(
    step: Step,
    outlook: Outlook,
    deepest: int,
    *,
    prefill: int = 0,
    weights: Floats | None = None,
) -> Depth:
    """The best source and depth for the sequences of ``step`` that decode.

    Args:
        deepest: most layers to consider.
        prefill: prompt tokens that share the step.
        weights: float64[R], what a token of each sequence counts for; 1 by default.
    """
    count = len(step.decoding)
    worth = np.ones(count) if weights is None else weights
    sizes = np.array(ladder(0, max(0, min(step.room - prefill, deepest * count))))
    passes = np.array([step.milliseconds(int(size), prefill) for size in sizes])
    counts = np.arange(sizes[-1] + 1)
    costs = np.interp(counts, sizes, passes)
    best = Depth(0, outlook.sources[0], float(worth.sum()) / passes[0])
    may = np.array([s.speculate is not False for s in step.decoding])
    for source in outlook.sources:
        rates = np.array([outlook.calibration.rate(s.id, source) for s in step.decoding]) * may
        for depth in range(1, deepest + 1):
            gains = _gains(rates, worth, depth)[: sizes[-1]]
            tokens = worth.sum() + np.concatenate([[0.0], np.cumsum(gains)])
            spent = costs[: len(tokens)] + outlook.drafts.draft_ms(source, count, depth, 1)
            rate = float((tokens / spent).max())
            if rate > best.rate:
                best = Depth(depth, source, rate)
    return best


def _gains(rates: Floats, worth: Floats, depth: int) -> Floats:
    """What each node of chains of ``depth`` is worth, best first."""
    if (worth == 1.0).all():
        return survival(rates, depth)
    return np.asarray(-np.sort(-(worth[:, None] * rates[:, None] ** np.arange(1, depth + 1)).ravel()))
