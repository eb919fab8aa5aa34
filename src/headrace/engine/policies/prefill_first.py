"""Whole prompts before any decoding: continuous batching as vLLM did it first (SOSP 2023)."""

from __future__ import annotations

from headrace.core.order import admit_in_order, in_prefill, urgency, victims
from headrace.core.policy import Steadiness, StepPlan, View


class PrefillFirst:
    """While any admitted prompt is not in slots, the step holds prompts only; otherwise every sequence decodes.

    Best for throughput and time to first token; decoding sequences stall behind long prompts.
    """

    steady: Steadiness = "always"

    def admit(self, view: View) -> list[int]:
        return admit_in_order(view)

    def plan(self, view: View) -> StepPlan:
        ordered = sorted(view.running, key=urgency)
        prompts = [s for s in ordered if in_prefill(s)]
        last = victims(view.running)
        if not prompts:
            return StepPlan(chunks=[(s.id, 1) for s in ordered[: view.limits.max_step_tokens]], victims=last)
        chunks: list[tuple[int, int]] = []
        budget = view.limits.max_prefill_tokens
        for sequence in prompts:
            # A prompt that does not fit goes in the next step, unless it is the first: then it is cut to the budget.
            if sequence.pending > budget and chunks:
                break
            size = min(sequence.pending, budget)
            chunks.append((sequence.id, size))
            budget -= size
            if budget == 0:
                break
        return StepPlan(chunks=chunks, victims=last)
