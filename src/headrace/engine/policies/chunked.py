"""Decode first, then fill the step with pieces of prompts (Sarathi-Serve, OSDI 2024, algorithm 3)."""

from __future__ import annotations

from headrace.core.order import admit_in_order, in_prefill, urgency, victims
from headrace.core.policy import Steadiness, StepPlan, View


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
        chunks = [(s.id, 1) for s in ordered if not in_prefill(s)][:budget]
        budget -= len(chunks)
        for sequence in ordered:
            if budget == 0:
                break
            if in_prefill(sequence):
                size = min(sequence.pending, budget)
                chunks.append((sequence.id, size))
                budget -= size
        return StepPlan(chunks=chunks, victims=victims(view.running))
