"""Decode first, then fill the step with pieces of prompts (Sarathi-Serve, OSDI 2024, algorithm 3)."""

from __future__ import annotations

from headrace.core.order import admit_in_order, in_prefill, urgency
from headrace.core.policy import SequenceView, Steadiness, StepPlan, View


class Chunked:
    """Chunked prefill: every decoding sequence advances in every step, and prompts share what is left of the budget.

    A long prompt is spread over several steps, so it never stalls those who are already being answered.
    """

    steady: Steadiness = "always"

    def admit(self, view: View) -> list[int]:
        return admit_in_order(view)

    def plan(self, view: View) -> StepPlan:
        ordered = sorted(view.running, key=urgency)
        budget = view.limits.max_step_tokens
        prompts: list[SequenceView] = []
        decodes: list[SequenceView] = []
        for sequence in ordered:
            (prompts if in_prefill(sequence) else decodes).append(sequence)
        chunks = [(s.id, 1) for s in decodes[:budget]]
        budget -= len(chunks)
        for sequence in prompts:
            if budget == 0:
                break
            size = min(sequence.pending, budget)
            chunks.append((sequence.id, size))
            budget -= size
        return StepPlan(chunks=chunks, victims=[s.id for s in reversed(ordered)])
