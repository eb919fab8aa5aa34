"""The same number of nodes for everybody: an ablation of AdaServe that spends the budget without looking at anybody's need."""

from __future__ import annotations

import numpy as np

from headrace.core.policy import StepPlan, View
from headrace.speculation.policies.fixed import prompts_only
from headrace.speculation.policies.paper import Paper
from headrace.speculation.policies.step import Step


class Equal(Paper):
    """The published policy's trees and budget, shared out evenly."""

    def plan(self, view: View) -> StepPlan:
        step = Step(view)
        if step.prompts:
            return prompts_only(step)
        forest = step.forest()
        count = max(1, len(step.decoding))
        share = max(0, self._rows(step) - count) // count
        return step.plan(forest, np.minimum(forest.sizes, share), 0)
