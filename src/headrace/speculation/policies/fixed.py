"""A chain of the same length for everybody in every step, prompts first: speculation as vLLM offers it with a draft model."""

from __future__ import annotations

import numpy as np

from headrace.core.order import admit_in_order
from headrace.core.policy import StepPlan, View
from headrace.core.speculation import DraftPlan
from headrace.speculation.policies.step import Step, orders
from headrace.speculation.select import select


class FixedChain:
    """Chains of ``length``; while any prompt is not in slots a step holds prompts only.

    Args:
        length: nodes of every chain.
    """

    def __init__(self, length: int) -> None:
        self._length = length

    def admit(self, view: View) -> list[int]:
        return admit_in_order(view)

    def draft(self, view: View) -> DraftPlan:
        step = Step(view)
        if step.prompts or view.outlook is None:
            return DraftPlan()
        return DraftPlan(orders(step.decoding, view.outlook.sources[0], [self._length] * len(step.decoding)))

    def plan(self, view: View) -> StepPlan:
        step = Step(view)
        if step.prompts:
            return prompts_only(step)
        forest = step.forest()
        return step.plan(forest, select(forest, np.zeros(len(forest)), step.room).taken, 0)


def prompts_only(step: Step) -> StepPlan:
    """As many prompts as fit whole, or a piece of the first."""
    budget = step.view.limits.max_prefill_tokens
    total = 0
    for prompt in step.prompts:
        if total and total + prompt.pending > budget:
            break
        total += min(prompt.pending, budget)
    chunks = step.chunks(total)[len(step.decoding) :]
    return StepPlan(chunks=chunks, victims=step.plain(0).victims)
