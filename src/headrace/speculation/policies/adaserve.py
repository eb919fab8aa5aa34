"""AdaServe for machines as they are: every step as deep and as large as it pays, targets served where they can still be met.

What the published algorithm leaves open or gets wrong under load is settled here: the budget is no constant but ends
where another node no longer pays; requests that cannot be in time any more get no more than their share of throughput;
prompts take no more of a step than the requests that are being answered can spare; and where drafts do not pay, there
are none.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from headrace.core.order import admit_in_order
from headrace.core.policy import SequenceView, StepPlan, View
from headrace.core.speculation import DraftPlan, Floats, Outlook
from headrace.speculation.forest import Forest
from headrace.speculation.pace import Pace
from headrace.speculation.policies.step import Step, forecast, orders
from headrace.speculation.select import best_yield, ladder, select

SECOND_CHANCE = 4.0
"""A request that missed its time to first token is due again after so many times its target."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What may be tuned; the defaults are measured on replays (see docs/speculation.md).

    Attributes:
        deepest: most layers of a draft.
        width: nodes in a layer; 1 drafts chains.
        headroom: share of a TPOT target to aim at.
        horizon: tokens over which a request that is behind catches up.
        patience_ms: time to first token to aim at for requests without such a target.
        prefill_rows: share of a step's rows that prompts may take beside drafts.
        prefill_share: share of a step's time that prompts may take whoever waits for tokens.
        slo_phase: False spends everything on throughput: an ablation.
        triage: False serves hopeless requests like any other: an ablation.
        tolerance: share of the requests that may lose their pace for a higher yield.
        forced_depth: least depth for requests that force speculation on.
    """

    deepest: int = 10
    width: int = 1
    headroom: float = 0.97
    horizon: float = 64.0
    patience_ms: float = 3000.0
    prefill_rows: float = 0.5
    prefill_share: float = 0.25
    slo_phase: bool = True
    triage: bool = True
    tolerance: float = 0.01
    forced_depth: int = 4


class AdaServe:
    """The policy that headrace uses by default where it can draft."""

    def __init__(self, settings: Settings | None = None) -> None:
        self._set = settings or Settings()

    def admit(self, view: View) -> list[int]:
        """By priority, then by who must have its first token soonest."""
        return admit_in_order(replace(view, waiting=sorted(view.waiting, key=lambda s: self._urgency(view, s))))

    def draft(self, view: View) -> DraftPlan:
        """The depth with which most requests keep their pace, and among such depths the one that yields most."""
        step = Step(view, lambda s: self._urgency(view, s))
        if view.outlook is None or not step.decoding:
            return DraftPlan()
        source, depth = self._depth(step, view.outlook)
        depths = [max(depth, self._set.forced_depth) if s.speculate else depth for s in step.decoding]
        return DraftPlan(orders(step.decoding, source, depths, self._set.width))

    def plan(self, view: View) -> StepPlan:
        """Prompt tokens first, bounded by slack; then nodes for those behind; then nodes that pay."""
        step = Step(view, lambda s: self._urgency(view, s))
        forest = step.forest()
        count = len(step.decoding)
        drafted = step.drafted(self._set.width)
        pays = self._paying(step, forest, drafted)
        usual = drafted + step.milliseconds(pays)
        pace = Pace(step.decoding, view.now, headroom=self._set.headroom)
        reach = forest.expected(forest.sizes)
        feasible = self._feasible(pace, reach, usual)
        prefill = self._prefill(step, pace, reach, usual, feasible, pays)

        def worth(owed: int, gains: Floats) -> int:
            def cost(nodes: int) -> float:
                return drafted + step.milliseconds(owed + nodes, prefill)

            return best_yield(float(count), gains, cost)[0]

        need = np.zeros(count)
        if self._set.slo_phase and count:
            took = drafted + step.milliseconds(pays, prefill)
            need = np.where(feasible, pace.speed(self._set.horizon) * took, 0.0)
        chosen = select(forest, need, step.room - prefill, first="fewest", worth=worth)
        return step.plan(forest, chosen.taken, prefill)

    def _paying(self, step: Step, forest: Forest, drafted: float) -> int:
        """How many nodes pay for themselves, without regard to targets and prompts."""
        gains = np.sort(forest.probabilities)[::-1][: step.room]
        return best_yield(float(len(forest)), gains, lambda nodes: drafted + step.milliseconds(nodes))[0]

    def _urgency(self, view: View, sequence: SequenceView) -> tuple[int, float, int]:
        """Priority, then the moment its first token is due.

        One that has missed it makes room for those that may still be in time, but not for ever: it gets a second date.
        """
        wanted = self._set.patience_ms if sequence.slo.ttft_ms is None else sequence.slo.ttft_ms
        due = sequence.arrival + wanted * 1e-3
        if due < view.now:
            due += SECOND_CHANCE * wanted * 1e-3
        return sequence.priority, due, sequence.id

    def _feasible(self, pace: Pace, reach: Floats, milliseconds: float) -> NDArray[np.bool_]:
        """Who has a target and would still meet it, were every step such a step and all its nodes his."""
        with np.errstate(invalid="ignore"):
            in_time = reach / milliseconds >= pace.speed()
        aimed = np.isfinite(pace.target)
        return aimed & in_time if self._set.triage else aimed

    def _prefill(
        self, step: Step, pace: Pace, reach: Floats, usual: float, aimed: NDArray[np.bool_], nodes: int
    ) -> int:
        """Prompt tokens in the step: as many as the requests being answered can spare time for."""
        most = step.prefill_beside(nodes, self._set.prefill_rows)
        if not most or not step.decoding or not self._set.slo_phase:
            return most
        oldest = min(s.arrival for s in step.prompts)
        if (step.view.now - oldest) * 1e3 > self._set.patience_ms:
            return most
        if not aimed.any():
            return most
        slack = (pace.time_left() - pace.left * usual / reach)[aimed].min()
        spare = max(slack / 2, self._set.prefill_share * usual)
        sizes = ladder(0, most)
        base = step.milliseconds(0)
        fits = [size for size in sizes if step.milliseconds(0, size) - base <= spare]
        return max(fits, default=0)

    def _depth(self, step: Step, outlook: Outlook) -> tuple[str, int]:
        """The source and depth to draft; of those with which about as many requests keep their pace, the one that yields most."""
        pace = Pace(step.decoding, step.view.now, headroom=self._set.headroom)
        speed, aimed = pace.speed(self._set.horizon), np.isfinite(pace.target)
        prefill = step.prefill_beside(step.room // 2)
        found: list[tuple[float, float, str, int]] = []
        for source in outlook.sources:
            promised = forecast(step, source, self._set.deepest, width=self._set.width, prefill=prefill)
            kept = np.zeros(len(promised.rate))
            if self._set.slo_phase:
                kept = promised.kept(speed, aimed & ~promised.hopeless(speed) if self._set.triage else aimed)
            found += [(float(k), float(r), source, d) for d, (k, r) in enumerate(zip(kept, promised.rate, strict=True))]
        enough = max(kept for kept, *_ in found) - self._set.tolerance * len(step.decoding)
        _, _, source, depth = max((f for f in found if f[0] >= enough), key=lambda f: f[1])
        return source, depth
