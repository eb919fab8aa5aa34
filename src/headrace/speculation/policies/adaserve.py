"""AdaServe for machines as they are: every step as deep and as large as it pays, targets served where they can still be met.

What the published algorithm leaves open or gets wrong under load is settled here: the budget is no constant but ends
where another node no longer pays; requests that cannot be in time any more get no more than their share of throughput;
prompts take no more of a step than the requests that are being answered can spare; and where drafts do not pay, there
are none.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from headrace.core.order import admit_in_order
from headrace.core.policy import SequenceView, StepPlan, View
from headrace.core.speculation import DraftPlan, Floats, Outlook
from headrace.speculation.forest import Forest
from headrace.speculation.pace import Pace, share_met
from headrace.speculation.policies.step import Step, forecast, orders
from headrace.speculation.select import Selection, best_yield, ladder, select

T = TypeVar("T")

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
        give: share of the yield that targets may cost: what is lost now comes back as a longer queue for everybody.
        give_for_all: the same where it brings everybody in time.
        forced_depth: least depth for requests that force speculation on.
    """

    deepest: int = 8
    width: int = 1
    headroom: float = 0.97
    horizon: float = 64.0
    patience_ms: float = 3000.0
    prefill_rows: float = 0.5
    prefill_share: float = 0.25
    slo_phase: bool = True
    triage: bool = True
    tolerance: float = 0.01
    give: float = 0.05
    give_for_all: float = 0.3
    forced_depth: int = 4


@dataclass(frozen=True, slots=True)
class _Costs:
    """What a step costs after drafting and with its prompts; ``room`` is for nodes."""

    step: Step
    drafted: float
    prefill: int

    @property
    def room(self) -> int:
        return self.step.room - self.prefill

    def milliseconds(self, nodes: int) -> float:
        return self.drafted + self.step.milliseconds(nodes, self.prefill)

    def own(self, nodes: int) -> float:
        """Without the prompts: they have to be computed in any case, and shall not make a large step look cheap."""
        return self.drafted + self.step.milliseconds(nodes)

    def rate(self, forest: Forest, chosen: Selection) -> float:
        """Tokens a millisecond."""
        return float(forest.expected(chosen.taken).sum()) / self.own(chosen.total)


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
        if not depth and view.outlook.free:
            source, depth = view.outlook.free[0], self._set.deepest
        depths = [max(depth, self._set.forced_depth) if s.speculate else depth for s in step.decoding]
        return DraftPlan(orders(step.decoding, source, depths, self._set.width))

    def plan(self, view: View) -> StepPlan:
        """Prompt tokens bounded by slack, nodes for those behind, and nodes that pay."""
        step = Step(view, lambda s: self._urgency(view, s))
        if not step.prompts and not view.candidates:
            return step.plain(0)
        forest = step.forest()
        drafted = step.drafted(self._set.width)
        pays = self._paying(step, forest, drafted)
        usual = drafted + step.milliseconds(pays)
        pace = Pace(step.decoding, view.now, headroom=self._set.headroom)
        reach = forest.expected(forest.sizes)
        feasible = self._feasible(pace, reach, drafted + step.milliseconds(pays // 2))
        prefill = self._prefill(step, pace, reach, usual, feasible, pays)
        costs = _Costs(step, drafted, prefill)
        best = self._spent(forest, costs, np.zeros(len(forest)), np.ones(len(forest)))
        if self._set.slo_phase and feasible.any():
            best = self._aimed(forest, costs, best, pace.speed(self._set.horizon), feasible)
        return step.plan(forest, best.taken, prefill)

    def _aimed(
        self, forest: Forest, costs: _Costs, blind: Selection, speed: Floats, feasible: NDArray[np.bool_]
    ) -> Selection:
        """The choice that keeps the most requests on their pace.

        Nodes for those behind may come on top of those that pay, or in their place: everybody else's nodes make the step slower, so
        those with time to spare go without, should that bring others back in time.
        """
        count = len(forest)

        def kept(chosen: Selection) -> float:
            need = speed * costs.milliseconds(chosen.total)
            return float(share_met(forest.expected(chosen.taken), need, feasible))

        everybody = kept(blind)
        if everybody >= feasible.sum() - self._set.tolerance * count:
            return blind
        need = np.where(feasible, speed * costs.milliseconds(blind.total), 0.0)
        ahead = ~feasible | (forest.expected(blind.taken) > 1.25 * need)
        choices = [(everybody, blind)]
        for weights in (np.ones(count), np.where(ahead, 0.0, 1.0), np.zeros(count)):
            took = costs.milliseconds(blind.total if weights.all() else 0)
            chosen = blind
            for _ in range(2):  # what they need depends on how long the step takes, and that on what they get
                chosen = self._spent(forest, costs, np.where(feasible, speed * took, 0.0), weights)
                took = costs.milliseconds(chosen.total)
            choices.append((kept(chosen), chosen))
        rated = [(score, costs.rate(forest, chosen), chosen) for score, chosen in choices]
        return self._affordable(rated, float(feasible.sum()), count)

    def _affordable(self, choices: list[tuple[float, float, T]], everybody: float, count: int) -> T:
        """Of (requests that keep their pace, yield, choice) the one to take.

        Whatever brings everybody in time may cost much of the yield, for then there is no queue that it could lengthen. Otherwise
        it may cost little, and goes to where it brings most.
        """
        slack = self._set.tolerance * count
        best = max(rate for _, rate, _ in choices)
        enough = [c for c in choices if c[0] >= everybody - slack and c[1] >= (1.0 - self._set.give_for_all) * best]
        if not enough:
            cheap = [c for c in choices if c[1] >= (1.0 - self._set.give) * best]
            most = max(kept for kept, *_ in cheap)
            enough = [c for c in cheap if c[0] >= most - slack]
        return max(enough, key=lambda c: c[1])[2]

    def _spent(self, forest: Forest, costs: _Costs, need: Floats, weights: Floats) -> Selection:
        """Both phases: nodes that are owed, then nodes that pay, for those whose weight is not 0."""
        count = float(len(forest))

        def worth(owed: int, gains: Floats) -> int:
            return best_yield(count, gains, lambda nodes: costs.own(owed + nodes))[0]

        if not weights.any():
            return select(forest, need, costs.room, first="fewest", worth=lambda owed, gains: 0)
        return select(forest, need, costs.room, first="fewest", weights=weights, worth=worth)

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
        found: list[tuple[float, float, tuple[str, int]]] = []
        everybody = 0.0
        for source in outlook.sources:
            promised = forecast(step, source, self._set.deepest, width=self._set.width)
            kept = np.zeros(len(promised.rate))
            if self._set.slo_phase and aimed.any():
                counted = aimed & ~promised.hopeless(speed) if self._set.triage else aimed
                kept, everybody = promised.kept(speed, counted), float(counted.sum())
            found += [
                (float(k), float(r), (source, d)) for d, (k, r) in enumerate(zip(kept, promised.rate, strict=True))
            ]
        return self._affordable(found, everybody, len(step.decoding))
