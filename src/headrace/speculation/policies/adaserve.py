"""AdaServe for machines as they are: every step as deep and as large as it pays, targets served where they can still be met.

What the published algorithm leaves open or gets wrong under load is settled here: the budget is no constant but ends where another node
no longer pays; requests that cannot be in time any more get no more than their share of throughput; prompts take no more of a step than
the requests that are being answered can spare; and where drafts do not pay, there are none.
"""

from __future__ import annotations

import numpy as np

from headrace.core.order import admit_in_order
from headrace.core.policy import StepPlan, View
from headrace.core.speculation import DraftPlan, Floats
from headrace.speculation.depth import best_depth
from headrace.speculation.pace import Pace
from headrace.speculation.policies.step import Step, orders
from headrace.speculation.select import best_yield, select


class AdaServe:
    """The policy that headrace uses by default where it can draft.

    Args:
        deepest, width: most layers of a draft, and nodes in a layer.
        headroom: share of a target to aim at.
        slo_phase: False spends everything on throughput, as an ablation.
        patience_ms: time to first token to aim at for requests without such a target.
    """

    def __init__(
        self,
        *,
        deepest: int = 10,
        width: int = 1,
        headroom: float = 0.97,
        slo_phase: bool = True,
        patience_ms: float = 3000.0,
    ) -> None:
        self._deepest, self._width = deepest, width
        self._headroom, self._slo_phase, self._patience_ms = headroom, slo_phase, patience_ms

    def admit(self, view: View) -> list[int]:
        return admit_in_order(view)

    def draft(self, view: View) -> DraftPlan:
        step = Step(view)
        if view.outlook is None or not step.decoding:
            return DraftPlan()
        prefill = min(step.pending, step.room)
        choice = best_depth(step, view.outlook, self._deepest, prefill=prefill)
        return DraftPlan(orders(step.decoding, choice.source, [choice.depth] * len(step.decoding), self._width))

    def plan(self, view: View) -> StepPlan:
        step = Step(view)
        forest = step.forest()
        count = len(step.decoding)
        prefill = min(step.pending, step.room)
        room = step.room - prefill

        def worth(owed: int, gains: Floats) -> int:
            return best_yield(float(count), gains, lambda nodes: step.milliseconds(owed + nodes, prefill))[0]

        need = np.zeros(count)
        if self._slo_phase and count:
            pace = Pace(step.decoding, view.now, headroom=self._headroom)
            need = self._needs(pace, step.milliseconds(room // 2, prefill))
        chosen = select(forest, need, room, first="fewest", worth=worth)
        return step.plan(forest, chosen.taken, prefill)

    def _needs(self, pace: Pace, milliseconds: float) -> Floats:
        need = pace.need(milliseconds)
        need[np.isinf(pace.target)] = 0.0
        return need
