"""The step a policy is about to plan: who decodes, who is in prefill, and what the step costs as it grows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from headrace.core.batch import Ints, StepShape
from headrace.core.order import in_prefill, urgency
from headrace.core.policy import SequenceView, StepPlan, View
from headrace.core.speculation import DraftOrder, DraftTree, Floats
from headrace.speculation.forecast import Forecast
from headrace.speculation.forest import Counts, Forest
from headrace.speculation.select import ladder

UNKNOWN_FLAT_ROWS = 16.0
"""Without a profile a step is taken to cost as much again for every so many rows."""

_RUNGS = ladder(0, 1 << 20)


class Step:
    """A step under construction.

    Args:
        view: the state before the step.
        first: sorts the sequences in prefill, the most urgent first.

    Attributes:
        view: what it is made from.
        decoding: sequences that decode, most urgent first, as many as a step may hold.
        prompts: sequences in prefill, most urgent first.
        aims: whether any that decodes has a TPOT target.
    """

    def __init__(self, view: View, first: Callable[[SequenceView], Any] | None = None) -> None:
        self.view = view
        ordered = sorted(view.running, key=urgency)
        decoding: list[SequenceView] = []
        self.prompts: list[SequenceView] = []
        for sequence in ordered:
            (self.prompts if in_prefill(sequence) else decoding).append(sequence)
        if first is not None and len(self.prompts) > 1:
            self.prompts.sort(key=first)
        self.decoding = decoding[: view.limits.max_step_tokens]
        self._ordered = ordered
        self._known: dict[int, Floats] = {}

    @property
    def aims(self) -> bool:
        """Whether any that decodes has a TPOT target."""
        return any(s.slo.tpot_ms is not None for s in self.decoding)

    @property
    def room(self) -> int:
        """Rows left in the step beside one for each sequence that decodes."""
        return self.view.limits.max_step_tokens - len(self.decoding)

    @property
    def pending(self) -> int:
        """Prompt tokens that wait for their K and V."""
        return sum(s.pending for s in self.prompts)

    # ---- what it costs ---------------------------------------------------------------------------------------

    def milliseconds(self, nodes: int, prefill: int = 0) -> float:
        """What the target's pass costs with so many draft nodes and prompt tokens in it."""
        return float(self.passes(nodes, prefill)[nodes])

    def passes(self, most: int, prefill: int = 0) -> Floats:
        """float64[k], k > ``most``: what the target's pass costs with 0, 1, ... draft nodes beside ``prefill`` prompt tokens."""
        known = self._known.get(prefill)
        if known is None or len(known) <= most:
            known = self._known[prefill] = self._passes(most, prefill)
        return known

    def _passes(self, most: int, prefill: int) -> Floats:
        roots = len(self.decoding)
        nodes = np.arange(most + 1, dtype=np.float64)
        profile = self.view.profile
        if profile is None:
            return np.asarray(1.0 + (roots + nodes + prefill) / UNKNOWN_FLAT_ROWS)
        shape, mean = self._bare(prefill)
        growing = getattr(profile, "growing", None)
        if growing is not None:
            rows = roots + nodes
            return np.asarray(growing(shape, rows, shape.attended + _attended(rows, roots, mean)))
        # One that can only be asked step by step is asked at a few, always the same ones, and taken as linear between.
        sizes = _RUNGS[: next(place for place, size in enumerate(_RUNGS) if size >= most) + 1]
        costs = [self._cost(size, prefill, shape, mean) for size in sizes]
        return np.interp(nodes, sizes, costs)

    def _bare(self, prefill: int) -> tuple[StepShape, float]:
        """The shape of the step's prompts and roots, the roots' own pairs left out, and the mean context of a root."""
        roots = len(self.decoding)
        held = sum(s.context for s in self.decoding)
        mean = held / roots if roots else 0.0
        sequences, attended = roots, 0
        for prompt, size in _shared(self.prompts, prefill):
            held += prompt.context
            attended += size * (prompt.context + size)
            sequences += 1
        return StepShape(prefill, roots, held, sequences, attended), mean

    def _cost(self, nodes: int, prefill: int, shape: StepShape, mean: float) -> float:
        assert self.view.profile is not None
        roots = shape.decode_tokens
        attended = shape.attended + int(_attended(float(roots + nodes), roots, mean))
        grown = StepShape(prefill, roots + nodes, shape.context, shape.sequences, attended)
        return self.view.profile.cost(grown)

    def prefill_ms(self, prefill: int) -> float:
        """What the target's pass costs with so many prompt tokens and no drafts."""
        if self.view.profile is None:
            return self.milliseconds(0, prefill)
        return self._cost(0, prefill, *self._bare(prefill))

    def prefill_beside(self, nodes: int, least_share: float = 0.5) -> int:
        """Prompt tokens for which there is room beside ``nodes``; prompts get a share of the rows in any case."""
        return min(self.pending, max(self.room - nodes, int(least_share * self.room)))

    # ---- its candidates --------------------------------------------------------------------------------------

    def forest(self) -> Forest:
        """The candidates of the sequences that decode, in order."""
        return Forest(self.trees())

    def drafted(self, width: int = 1) -> float:
        """What it took to draft the candidates, milliseconds."""
        trees = [t for t in self.trees() if t is not None and len(t)]
        if self.view.outlook is None or not trees:
            return 0.0
        deepest = max(int(t.depths[-1]) for t in trees)
        return self.view.outlook.drafts.draft_ms(trees[0].source, len(trees), deepest, width)

    def trees(self) -> list[DraftTree | None]:
        """The candidate tree of each sequence that decodes."""
        return [self.view.candidates.get(s.id) for s in self.decoding]

    # ---- its plan --------------------------------------------------------------------------------------------

    def chunks(self, prefill: int) -> list[tuple[int, int]]:
        """A token for each sequence that decodes, then ``prefill`` prompt tokens, the most urgent prompts first."""
        return [(s.id, 1) for s in self.decoding] + [(s.id, size) for s, size in _shared(self.prompts, prefill)]

    def plan(self, forest: Forest, taken: Counts, prefill: int) -> StepPlan:
        """The plan in which each sequence verifies its ``taken`` best nodes."""
        nodes: dict[int, Ints] = {
            s.id: chosen for s, chosen in zip(self.decoding, forest.nodes(taken), strict=True) if len(chosen)
        }
        plan = self.plain(prefill)
        plan.nodes = nodes
        return plan

    def plain(self, prefill: int) -> StepPlan:
        """The plan without drafts; whom to preempt first is who came last."""
        return StepPlan(chunks=self.chunks(prefill), victims=[s.id for s in reversed(self._ordered)])


def _attended(rows: Any, roots: int, mean: float) -> Any:
    """(query, key) pairs of so many rows (a number or an array) that share ``roots`` contexts of ``mean`` tokens evenly."""
    return rows * (mean + rows / max(roots, 1))


def _shared(prompts: Sequence[SequenceView], tokens: int) -> list[tuple[SequenceView, int]]:
    """``tokens`` given to prompts in order, each as many as it can use."""
    given = []
    for prompt in prompts:
        size = min(prompt.pending, tokens)
        if size <= 0:
            break
        given.append((prompt, size))
        tokens -= size
    return given


def orders(sequences: Sequence[SequenceView], source: str, depths: Sequence[int], width: int = 1) -> list[DraftOrder]:
    """Orders for those whose depth is above 0 and who may be drafted for."""
    return [
        DraftOrder(s.id, source, depth, width)
        for s, depth in zip(sequences, depths, strict=True)
        if depth > 0 and s.speculate is not False
    ]


def forecast(
    step: Step, source: str, deepest: int, *, width: int = 1, prefill: int = 0, planning_ms: float = 0.0
) -> Forecast:
    """What each depth of drafting by ``source`` promises for the sequences of ``step`` that decode; the view has an outlook.

    ``planning_ms`` are what any draft costs beside drafting and verifying it.
    """
    outlook, count = step.view.outlook, len(step.decoding)
    assert outlook is not None
    chances = outlook.calibration.survival([s.id for s in step.decoding], source, deepest)
    refusing = [place for place, s in enumerate(step.decoding) if s.speculate is False]
    if refusing:
        chances[:, refusing] = 0.0
    drafting = np.array([outlook.drafts.draft_ms(source, count, depth, width) for depth in range(deepest + 1)])
    drafting[1:] += planning_ms
    most = max(0, min(step.room - prefill, deepest * count))
    return Forecast(chances, drafting, step.passes(most, prefill)[: most + 1])
