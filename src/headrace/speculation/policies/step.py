"""The step a policy is about to plan: who decodes, who is in prefill, and what the step costs as it grows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from headrace.core.batch import Ints, StepShape
from headrace.core.order import in_prefill, urgency, victims
from headrace.core.policy import SequenceView, StepPlan, View
from headrace.core.speculation import DraftOrder, DraftTree
from headrace.speculation.forecast import Forecast
from headrace.speculation.forest import Counts, Forest

UNKNOWN_FLAT_ROWS = 16.0
"""Without a profile a step is taken to cost as much again for every so many rows."""


class Step:
    """A step under construction.

    Args:
        view: the state before the step.
        key: sorts sequences, the most urgent first.

    Attributes:
        view: what it is made from.
        decoding: sequences that decode, most urgent first, as many as a step may hold.
        prompts: sequences in prefill, most urgent first.
    """

    def __init__(self, view: View, key: Callable[[SequenceView], Any] = urgency) -> None:
        self.view = view
        ordered = sorted(view.running, key=key)
        self.decoding = [s for s in ordered if not in_prefill(s)][: view.limits.max_step_tokens]
        self.prompts = [s for s in ordered if in_prefill(s)]
        self._context = sum(s.context for s in self.decoding)
        self._known: dict[tuple[int, int], float] = {}

    @property
    def room(self) -> int:
        """Rows left in the step beside one for each sequence that decodes."""
        return self.view.limits.max_step_tokens - len(self.decoding)

    def milliseconds(self, nodes: int, prefill: int = 0) -> float:
        """What the target's pass costs with so many draft nodes and prompt tokens in it."""
        known = self._known.get((nodes, prefill))
        if known is None:
            known = self._known[nodes, prefill] = self._cost(nodes, prefill)
        return known

    def _cost(self, nodes: int, prefill: int) -> float:
        roots = len(self.decoding)
        rows = roots + nodes
        if self.view.profile is None:
            return 1.0 + (rows + prefill) / UNKNOWN_FLAT_ROWS
        mean = self._context / roots if roots else 0.0
        held = self._context
        attended = rows * (mean + rows / max(roots, 1))
        sequences = roots
        for prompt, size in _shared(self.prompts, prefill):
            held += prompt.context
            attended += size * (prompt.context + size)
            sequences += 1
        return self.view.profile.cost(StepShape(prefill, rows, held, sequences, int(attended)))

    def prefill_beside(self, nodes: int, least_share: float = 0.5) -> int:
        """Prompt tokens for which there is room beside ``nodes``; prompts get a share of the rows in any case."""
        return min(self.pending, max(self.room - nodes, int(least_share * self.room)))

    def forest(self) -> Forest:
        """The candidates of the sequences that decode, in order."""
        return Forest(self.trees())

    def drafted(self, width: int = 1) -> float:
        """What it took to draft the candidates, milliseconds."""
        trees = [t for t in self.trees() if t is not None]
        if self.view.outlook is None or not trees:
            return 0.0
        deepest = max(int(t.depths[-1]) for t in trees)
        return self.view.outlook.drafts.draft_ms(trees[0].source, len(trees), deepest, width)

    def trees(self) -> list[DraftTree | None]:
        """The candidate tree of each sequence that decodes."""
        return [self.view.candidates.get(s.id) for s in self.decoding]

    def chunks(self, prefill: int) -> list[tuple[int, int]]:
        """A token for each sequence that decodes, then ``prefill`` prompt tokens, the most urgent prompts first."""
        return [(s.id, 1) for s in self.decoding] + [(s.id, size) for s, size in _shared(self.prompts, prefill)]

    def plan(self, forest: Forest, taken: Counts, prefill: int) -> StepPlan:
        """The plan in which each sequence verifies its ``taken`` best nodes."""
        nodes: dict[int, Ints] = {
            s.id: chosen for s, chosen in zip(self.decoding, forest.nodes(taken), strict=True) if len(chosen)
        }
        return StepPlan(chunks=self.chunks(prefill), victims=victims(self.view.running), nodes=nodes)

    def plain(self, prefill: int) -> StepPlan:
        """The plan without drafts."""
        return StepPlan(chunks=self.chunks(prefill), victims=victims(self.view.running))

    @property
    def pending(self) -> int:
        """Prompt tokens that wait for their K and V."""
        return sum(s.pending for s in self.prompts)


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


def forecast(step: Step, source: str, deepest: int, *, width: int = 1, prefill: int = 0) -> Forecast:
    """What each depth of drafting by ``source`` promises for the sequences of ``step`` that decode; the view has an outlook."""
    outlook, count = step.view.outlook, len(step.decoding)
    assert outlook is not None
    chances = outlook.calibration.survival([s.id for s in step.decoding], source, deepest)
    chances[:, [s.speculate is False for s in step.decoding]] = 0.0
    drafting = np.array([outlook.drafts.draft_ms(source, count, depth, width) for depth in range(deepest + 1)])
    return Forecast(chances, drafting, lambda nodes: step.milliseconds(nodes, prefill), step.room - prefill)
