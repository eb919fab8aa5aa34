"""AdaServe as published (EuroSys 2026): a fixed budget filled in every step, depth and width from the number of requests.

The two constants that the paper found by grid search are not published; they are 0 here unless given. Speculation is
never off, targets are served the most needy first, whether they can be met or not, and prompts get steps of their
own.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from headrace.core.order import admit_in_order
from headrace.core.policy import StepPlan, View
from headrace.core.speculation import DraftPlan
from headrace.speculation.pace import Pace
from headrace.speculation.policies.fixed import prompts_only
from headrace.speculation.policies.step import Step, orders
from headrace.speculation.select import Urgency, select


class Paper:
    """The published algorithm 2.

    Args:
        budget: rows of a verification, roots included.
        requests: most requests at once.
        depths, widths: least and most layers, and nodes in a layer.
        draft_rows: rows of a drafting pass that all requests share.
        c1, c2: the constants of the depth and the width.
        first: whom the SLO phase serves first; the paper's text says those who need most.
    """

    def __init__(
        self,
        *,
        budget: int = 512,
        requests: int = 64,
        depths: tuple[int, int] = (4, 8),
        widths: tuple[int, int] = (1, 3),
        draft_rows: int = 96,
        c1: int = 0,
        c2: int = 0,
        first: Urgency = "most",
    ) -> None:
        self._budget, self._requests = budget, requests
        self._depths, self._widths, self._draft_rows = depths, widths, draft_rows
        self._c1, self._c2, self._first = c1, c2, first

    def admit(self, view: View) -> list[int]:
        most = min(view.limits.max_sequences, self._requests)
        return admit_in_order(replace(view, limits=replace(view.limits, max_sequences=most)))

    def draft(self, view: View) -> DraftPlan:
        step = Step(view)
        count = len(step.decoding)
        if step.prompts or not count or view.outlook is None:
            return DraftPlan()
        depth = _clip(self._rows(step) // (count + self._c1) - 1, self._depths)
        width = _clip(self._draft_rows // count + self._c2, self._widths)
        return DraftPlan(orders(step.decoding, view.outlook.sources[0], [depth] * count, width))

    def plan(self, view: View) -> StepPlan:
        step = Step(view)
        if step.prompts:
            return prompts_only(step)
        forest = step.forest()
        count, budget = max(1, len(step.decoding)), self._rows(step)
        deepest = max((int(t.depths[-1]) for t in step.trees() if t is not None), default=0)
        pace = Pace(step.decoding, view.now)
        # Drafting is over when the plan is made and counts as elapsed: what is still to come is the target's pass.
        need = np.clip(pace.need(step.milliseconds(budget - count)), 1.0, deepest + 1.0)
        need[np.isinf(pace.target)] = 0.0
        chosen = select(forest, need, max(0, budget - count), n_max=int(1.2 * budget / count), first=self._first)
        return step.plan(forest, chosen.taken, 0)

    def _rows(self, step: Step) -> int:
        return min(self._budget, step.view.limits.max_step_tokens)


def _clip(value: int, bounds: tuple[int, int]) -> int:
    return max(bounds[0], min(bounds[1], value))
