"""Chains whose length follows from measured cost and acceptance, nodes ranked across requests, no targets.

The way of TurboSpec and of vLLM's adaptive verification: the length that promises most tokens a millisecond is drafted,
and as many nodes are verified, the likeliest first, as still raise that rate.
"""

from __future__ import annotations

import numpy as np

from headrace.core.order import admit_in_order
from headrace.core.policy import StepPlan, View
from headrace.core.speculation import DraftPlan
from headrace.speculation.policies.step import Step, forecast, orders
from headrace.speculation.select import best_yield


class AdaptiveChain:
    """Chunked prefill and chains of up to ``longest`` nodes."""

    def __init__(self, longest: int = 8) -> None:
        self._longest = longest

    def admit(self, view: View) -> list[int]:
        return admit_in_order(view)

    def draft(self, view: View) -> DraftPlan:
        step = Step(view)
        if view.outlook is None or not step.decoding:
            return DraftPlan()
        prefill = step.prefill_beside(step.room // 2)
        found = [(forecast(step, source, self._longest, prefill=prefill), source) for source in view.outlook.sources]
        promised, source = max(found, key=lambda f: float(f[0].rate.max()))
        return DraftPlan(orders(step.decoding, source, [int(promised.rate.argmax())] * len(step.decoding)))

    def plan(self, view: View) -> StepPlan:
        step = Step(view)
        forest = step.forest()
        places = forest.merged(np.zeros(len(forest), np.int64))[: step.room]
        prefill = step.prefill_beside(len(places))
        places = places[: step.room - prefill]
        drafted = step.drafted()
        spent = drafted + step.passes(len(places), prefill)
        count = best_yield(float(len(forest)), forest.gains[places], spent)
        taken = np.bincount(forest.owners[places[:count]], minlength=len(forest))
        return step.plan(forest, taken, prefill)
