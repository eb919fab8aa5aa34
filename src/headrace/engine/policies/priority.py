"""Strict priority: lower values first, as vLLM's ``--scheduling-policy priority`` counts them; the urgent displace the rest."""

from __future__ import annotations

from headrace.core.policy import SequenceView, Steadiness, StepPlan, View
from headrace.engine.policies.ranked import admit_ranked, plan_ranked


class Priority:
    """The priority value decides everything; within one value, first come, first served with chunked prefill.

    A request waits for no place, no slot and no token of the step that a less urgent one holds. Less urgent requests
    starve while more urgent ones keep coming: that is what strict means.
    """

    steady: Steadiness = "always"

    def admit(self, view: View) -> list[int]:
        return admit_ranked(view, _value)

    def plan(self, view: View) -> StepPlan:
        return plan_ranked(view, _value)


def _value(sequence: SequenceView) -> int:
    return sequence.priority
