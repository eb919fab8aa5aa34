"""AdaServe for machines as they are: every step as deep and as large as it pays, targets served where they can still be met.

What the published algorithm leaves open or gets wrong under load is settled here: the budget is no constant but ends
where another node no longer pays; requests that cannot be in time any more get no more than their share of throughput;
prompts take no more of a step than the requests that are being answered can spare; and where drafts do not pay, there
are none, but for a trial now and then.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from headrace.core.order import admit_in_order
from headrace.core.policy import SequenceView, StepPlan, View
from headrace.core.speculation import DraftPlan, Floats, Outlook
from headrace.speculation.forecast import Forecast
from headrace.speculation.forest import Counts, Forest
from headrace.speculation.pace import Pace, share_met
from headrace.speculation.policies.step import Step, forecast, orders
from headrace.speculation.select import Selection, best_yield, ladder, select
from headrace.speculation.switch import PLANNING_MS, Choice, Switch
from headrace.speculation.trials import Trials

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
        ttft_headroom: share of the time left until a first token is due in which to compute its prompt.
        patience_ms: time to first token to aim at for requests without such a target.
        prefill_rows: share of a step's rows that prompts may take beside drafts.
        prefill_share: share of a step's time that prompts may take whoever waits for tokens.
        slo_phase: False spends everything on throughput: an ablation.
        triage: False serves hopeless requests like any other: an ablation.
        tolerance: share of the requests that may lose their pace for a higher yield.
        give: share of the yield that targets may cost: what is lost now comes back as a longer queue for everybody.
        give_for_all: the same where it brings everybody in time.
        forced_depth: least depth for requests that force speculation on.
        hold: steps for which a depth is kept while as many requests decode.
        trials: False never tries again what was judged too dear: an ablation.
    """

    deepest: int = 8
    width: int = 1
    headroom: float = 0.97
    horizon: float = 64.0
    ttft_headroom: float = 0.6
    patience_ms: float = 3000.0
    prefill_rows: float = 0.5
    prefill_share: float = 0.25
    slo_phase: bool = True
    triage: bool = True
    tolerance: float = 0.01
    give: float = 0.05
    give_for_all: float = 0.3
    forced_depth: int = 4
    hold: int = 4
    trials: bool = True


@dataclass(frozen=True, slots=True)
class _Costs:
    """What a step costs with 0, 1, ... nodes: drafting, target, and (in ``whole``) the step's prompts; ``room`` is for nodes.

    Prompts have to be computed in any case, and shall not make a large step look cheap: yields are reckoned without them.
    """

    own: Floats
    whole: Floats
    room: int

    def rate(self, forest: Forest, taken: Counts) -> float:
        """Tokens a millisecond."""
        return float(forest.expected(taken).sum() / self.own[int(taken.sum())])


class AdaServe:
    """The policy that headrace uses by default."""

    def __init__(self, settings: Settings | None = None) -> None:
        self._set = settings or Settings()
        self._switch = Switch(self._set.hold, Trials() if self._set.trials else None)
        self._begun: Step | None = None

    def admit(self, view: View) -> list[int]:
        """By priority, then by who must have its first token soonest."""
        if len(view.waiting) > 1:
            view = replace(view, waiting=sorted(view.waiting, key=lambda s: self._urgency(view, s)))
        return admit_in_order(view)

    # ---- what to draft ---------------------------------------------------------------------------------------

    def draft(self, view: View) -> DraftPlan:
        """The depth with which most requests keep their pace, and among such depths the one that yields most."""
        self._begun = None
        outlook = view.outlook
        if outlook is None or self._switch.rests(view):
            return DraftPlan()
        step = self._begun = self._step(view)
        if not step.decoding:
            return DraftPlan()
        choice = self._switch.choice(step, lambda: self._depth(step, outlook))
        width, found = self._set.width, {}
        if choice.depth:
            ordered = orders(step.decoding, choice.source, [choice.depth] * len(step.decoding), width)
            found = {order.sequence: order for order in ordered}
        found |= {order.sequence: order for order in self._switch.trial(step)}
        forced = [s for s in step.decoding if s.speculate]
        if forced:
            source = choice.source if choice.depth else outlook.sources[0]
            ordered = orders(forced, source, [max(choice.depth, self._set.forced_depth)] * len(forced), width)
            found |= {order.sequence: order for order in ordered}
        return DraftPlan(list(found.values()))

    def _depth(self, step: Step, outlook: Outlook) -> Choice:
        """The source and depth to draft; of those with which about as many requests keep their pace, the one that yields most."""
        promised = [
            (source, forecast(step, source, self._set.deepest, width=self._set.width, planning_ms=PLANNING_MS))
            for source in dict.fromkeys([*outlook.sources, *outlook.free])
        ]
        found = [(0.0, float(rate), (n, d)) for n, (_, p) in enumerate(promised) for d, rate in enumerate(p.rate)]
        best = max(found, key=lambda c: c[1])[2]
        if self._set.slo_phase and step.aims:
            pace = Pace(step.decoding, step.view.now, headroom=self._set.headroom)
            best = self._keeping(promised, best, found, pace)
        source, forecasted = promised[best[0]]
        depth = best[1] if source in outlook.sources or not best[1] else self._set.deepest
        return Choice(source, depth, float(forecasted.took[best[1]]))

    def _keeping(
        self,
        promised: list[tuple[str, Forecast]],
        best: tuple[int, int],
        found: list[tuple[float, float, tuple[int, int]]],
        pace: Pace,
    ) -> tuple[int, int]:
        """``best``, which yields most, if all keep their pace with it; else what is affordable of the others."""
        speed, aimed = pace.speed(self._set.horizon), np.isfinite(pace.target)

        def counted(each: Forecast) -> NDArray[np.bool_]:
            return aimed & ~each.hopeless(speed) if self._set.triage else aimed

        first = promised[best[0]][1]
        if first.keeps_all(best[1], speed, counted(first)):
            return best
        rated: list[tuple[float, float, tuple[int, int]]] = []
        everybody = 0.0
        for number, (_, each) in enumerate(promised):
            mine = counted(each)
            everybody = max(everybody, float(mine.sum()))
            kept = each.kept(speed, mine)
            rated += [(float(kept[d]), rate, (n, d)) for _, rate, (n, d) in found if n == number]
        return self._affordable(rated, everybody, len(aimed))

    # ---- what to run -----------------------------------------------------------------------------------------

    def plan(self, view: View) -> StepPlan:
        """Prompt tokens bounded by slack, nodes for those behind, and nodes that pay."""
        step, self._begun = self._begun, None
        if step is None or step.view is not view:
            step = self._step(view)
        if not view.candidates and not (step.prompts and step.decoding and step.aims):
            self._switch.planned(step, 0)
            return step.plain(step.prefill_beside(0, self._set.prefill_rows) if step.prompts else 0)
        forest = step.forest()
        drafted = step.drafted(self._set.width)
        most = min(step.room, len(forest.gains))
        own = drafted + step.passes(most)[: most + 1]
        places = forest.merged(np.zeros(len(forest), np.int64))
        gains = forest.gains[places]
        pays = best_yield(float(len(forest)), gains[:most], own)
        pace = Pace(step.decoding, view.now, headroom=self._set.headroom) if step.aims else None
        feasible, prefill = np.zeros(len(forest), bool), step.prefill_beside(pays, self._set.prefill_rows)
        if pace is not None:
            reach = forest.expected(forest.sizes)
            feasible = self._feasible(pace, reach, float(own[pays // 2]))
            if prefill and self._set.slo_phase:
                prefill = self._prefill(step, pace, reach, float(own[pays]), feasible, prefill)
        if prefill and pays > step.room - prefill:
            pays = best_yield(float(len(forest)), gains[: step.room - prefill], own)
        blind = np.bincount(forest.owners[places[:pays]], minlength=len(forest))
        taken = blind
        if pace is not None and self._set.slo_phase and feasible.any():
            room = min(most, step.room - prefill)
            whole = own if not prefill else drafted + step.passes(room, prefill)
            taken = self._aimed(forest, _Costs(own, whole, room), blind, pace.speed(self._set.horizon), feasible)
        taken = self._insisted(step, forest, taken, step.room - prefill)
        return step.plan(forest, taken, prefill)

    def _insisted(self, step: Step, forest: Forest, taken: Counts, room: int) -> Counts:
        """``taken``, with all nodes of those who force speculation on or are tried, as far as there is room."""
        tried = self._switch.verifying(step)
        whole = [s.id in tried or s.speculate is True for s in step.decoding]
        if not any(whole):
            self._switch.planned(step, 0)
            return taken
        more = np.where(whole, forest.sizes - taken, 0)
        spare = max(0, room - int(taken.sum()))
        taken = taken + np.clip(spare - (np.cumsum(more) - more), 0, more)
        self._switch.planned(step, sum(int(taken[n]) for n, s in enumerate(step.decoding) if s.id in tried))
        return taken

    def _aimed(
        self, forest: Forest, costs: _Costs, blind: Counts, speed: Floats, feasible: NDArray[np.bool_]
    ) -> Counts:
        """The choice that keeps the most requests on their pace.

        Nodes for those behind may come on top of those that pay (``blind``), or in their place: everybody else's nodes make the step
        slower, so those with time to spare go without, should that bring others back in time.
        """
        count, total = len(forest), int(blind.sum())

        def kept(taken: Counts, milliseconds: float) -> float:
            return float(share_met(forest.expected(taken), speed * milliseconds, feasible))

        usual = float(costs.whole[total])
        everybody, enough = kept(blind, usual), float(feasible.sum()) - self._set.tolerance * count
        if everybody >= enough:
            return blind
        need = np.where(feasible, speed * usual, 0.0)
        ahead = ~feasible | (forest.expected(blind) > 1.25 * need)
        choices = [(everybody, costs.rate(forest, blind), blind)]
        for weights in (np.ones(count), np.where(ahead, 0.0, 1.0), np.zeros(count)):
            nodes = total if weights.all() else 0
            for _ in range(2):  # what they need depends on how long the step takes, and that on what they get
                took = float(costs.whole[nodes])
                chosen = self._spent(forest, costs, np.where(feasible, speed * took, 0.0), weights)
                if chosen.total == nodes:
                    break
                nodes = chosen.total
            choices.append(
                (kept(chosen.taken, float(costs.whole[nodes])), costs.rate(forest, chosen.taken), chosen.taken)
            )
            if choices[-1][0] >= enough:  # those to come yield less
                break
        return self._affordable(choices, float(feasible.sum()), count)

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
            return best_yield(count, gains, costs.own[owed:])

        if not weights.any():
            return select(forest, need, costs.room, first="fewest", worth=lambda owed, gains: 0)
        return select(forest, need, costs.room, first="fewest", weights=weights, worth=worth)

    def _step(self, view: View) -> Step:
        return Step(view, lambda s: self._urgency(view, s))

    def _urgency(self, view: View, sequence: SequenceView) -> tuple[int, float, int]:
        """Priority, then the moment its first token is due.

        One that has missed it makes room for those that may still be in time, but not for ever: it gets a second date.
        """
        due, wanted = self._due(sequence)
        if due < view.now:
            due += SECOND_CHANCE * wanted * 1e-3
        return sequence.priority, due, sequence.id

    def _due(self, sequence: SequenceView) -> tuple[float, float]:
        """When its first token is due, in seconds on the engine's clock, and how many milliseconds after its arrival that is."""
        wanted = self._set.patience_ms if sequence.slo.ttft_ms is None else sequence.slo.ttft_ms
        return sequence.arrival + wanted * 1e-3, wanted

    def _feasible(self, pace: Pace, reach: Floats, milliseconds: float) -> NDArray[np.bool_]:
        """Who has a target and would still meet it, were every step such a step and all its nodes his."""
        with np.errstate(invalid="ignore"):
            in_time = reach / milliseconds >= pace.speed()
        aimed = np.isfinite(pace.target)
        return aimed & in_time if self._set.triage else aimed

    def _prefill(self, step: Step, pace: Pace, reach: Floats, usual: float, aimed: NDArray[np.bool_], most: int) -> int:
        """Of ``most`` prompt tokens, as many as the requests being answered can spare time for, and as first tokens in time need."""
        oldest = min(s.arrival for s in step.prompts)
        if (step.view.now - oldest) * 1e3 > self._set.patience_ms or not aimed.any():
            return most
        slack = float((pace.time_left() - pace.left * usual / reach)[aimed].min())
        spare = max(slack / 2, self._set.prefill_share * usual)
        sizes, base = ladder(0, most), step.prefill_ms(0)
        fitting = bisect_right(sizes, spare, key=lambda size: step.prefill_ms(size) - base)
        return min(most, max(sizes[max(0, fitting - 1)], self._needed(step, usual)))

    def _needed(self, step: Step, usual: float) -> int:
        """Prompt tokens a step, were all as long as this one (``usual`` milliseconds), for the TTFT targets that can be met."""
        needed, before = 0.0, 0
        for prompt in step.prompts:
            before += prompt.pending
            left = (self._due(prompt)[0] - step.view.now) * 1e3 * self._set.ttft_headroom
            if left > 0 and prompt.slo.ttft_ms is not None:
                needed = max(needed, before / max(1.0, left / usual))
        return math.ceil(needed)
