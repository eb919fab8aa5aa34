"""Drafters and what is learnt of them, between the engine and its policy."""

from __future__ import annotations

import time
from collections.abc import Mapping
from collections.abc import Sequence as Seq

import numpy as np

from headrace.core.batch import Ints
from headrace.core.speculation import (
    ROOT,
    Calibration,
    DraftCosts,
    Drafter,
    DraftJob,
    DraftOrder,
    DraftPlan,
    DraftTree,
    Outlook,
)
from headrace.engine.sequence import Sequence
from headrace.engine.structured.grammar import GrammarState

Asked = tuple[DraftOrder, Sequence]

_NEWS = 16
"""Tokens new to a drafter up to which a draft costs what drafts cost."""


class Drafting:
    """Has drafts made and remembers them until they are verified.

    Args:
        drafters: the sources, the best first.
        calibration: learns what becomes of drafts.
        costs: what drafting costs.
    """

    def __init__(self, drafters: Seq[Drafter], calibration: Calibration, costs: DraftCosts) -> None:
        self._drafters = {drafter.name: drafter for drafter in drafters}
        self._calibration = calibration
        self._made: dict[int, DraftTree] = {}
        self._shown: dict[tuple[str, int], int] = {}
        free = tuple(drafter.name for drafter in drafters if drafter.free)
        paid = tuple(drafter.name for drafter in drafters if not drafter.free)
        self.outlook = Outlook(paid or free, costs, calibration, free)

    def afresh(self, calibration: Calibration) -> Drafting:
        """The same drafters and costs with other beliefs about drafts."""
        return Drafting(list(self._drafters.values()), calibration, self.outlook.drafts)

    def draft(self, plan: DraftPlan, running: Mapping[int, Sequence]) -> dict[int, DraftTree]:
        """Trees for the sequences the plan names that decode and can use one, with calibrated probabilities."""
        self._made.clear()
        jobs: dict[str, list[Asked]] = {}
        for order in plan.orders:
            sequence = running.get(order.sequence)
            # The last accepted node is followed by one more token, so a sequence can use one layer less than it may generate.
            if sequence is not None and order.depth > 0 and sequence.pending == 1 and sequence.remaining > 1:
                jobs.setdefault(order.source, []).append((order, sequence))
        found: dict[int, DraftTree] = {}
        for source, asked in jobs.items():
            asked = self._for_nothing(source, asked, found)
            if asked:
                self._ask(source, asked, found)
        return found

    def _for_nothing(self, source: str, asked: list[Asked], found: dict[int, DraftTree]) -> list[Asked]:
        """Take the trees of drafters that cost nothing where they promise as much as ``source``; who is left to draft for."""
        for drafter in self._drafters.values():
            if not drafter.free or drafter.name == source or not asked:
                continue
            offered: dict[int, DraftTree] = {}
            self._ask(drafter.name, asked, offered)
            deepest = max(order.depth for order, _ in asked)
            usual = self._calibration.survival([s.id for _, s in asked], source, deepest)
            left = []
            for place, (order, sequence) in enumerate(asked):
                tree = offered.get(sequence.id)
                if tree is not None and tree.probabilities.sum() >= usual[: order.depth, place].sum():
                    found[sequence.id] = tree
                else:
                    self._made.pop(sequence.id, None)
                    left.append((order, sequence))
            asked = left
        return asked

    def _ask(self, source: str, asked: list[Asked], found: dict[int, DraftTree]) -> None:
        """Have trees made by ``source``; put those that offer something into ``found``, with calibrated probabilities."""
        work = [_job(order, sequence) for order, sequence in asked]
        started = time.perf_counter()
        trees = self._drafters[source].draft(work)
        took = (time.perf_counter() - started) * 1e3
        depth, width = max(job.depth for job in work), max(job.width for job in work)
        if self._usual(source, work):
            self.outlook.drafts.observe(source, len(work), depth, width, took)
        for (_, sequence), tree in zip(asked, trees, strict=True):
            if sequence.grammar is not None:
                tree = allowed(tree, sequence.grammar)
            calibrated = self._calibration.calibrated(sequence.id, tree)
            if len(tree):
                self._made[sequence.id], found[sequence.id] = tree, calibrated

    def _usual(self, source: str, work: Seq[DraftJob]) -> bool:
        """Whether the drafter has seen all but the last few tokens before: what it takes to read more is no cost of drafting."""
        usual = True
        for job in work:
            seen, size = self._shown.get((source, job.sequence), 0), len(job.tokens)
            self._shown[source, job.sequence] = size
            usual = usual and size - seen <= _NEWS
        return usual

    def chosen(self, sequence: int, nodes: Ints) -> DraftTree | None:
        """The part of a sequence's draft that is to be verified, as its drafter made it."""
        tree = self._made.get(sequence)
        return None if tree is None or not len(nodes) else tree.part(nodes)

    def verified(self, sequence: int, tree: DraftTree, accepted: Seq[int]) -> None:
        """Learn what became of a tree."""
        self._calibration.observe(sequence, tree, accepted)

    def forget(self, sequence: int) -> None:
        """A sequence has ended."""
        self._made.pop(sequence, None)
        for name in self._drafters:
            self._shown.pop((name, sequence), None)
        self._calibration.forget(sequence)
        for drafter in self._drafters.values():
            drafter.forget(sequence)


def _job(order: DraftOrder, sequence: Sequence) -> DraftJob:
    depth = min(order.depth, sequence.remaining - 1)
    return DraftJob(sequence.id, sequence.tokens[: sequence.length], depth, order.width)


def allowed(tree: DraftTree, grammar: GrammarState) -> DraftTree:
    """``tree`` without the nodes that the grammar rules out after their path; the state is left as it was.

    They could never be accepted, so pruning them only saves rows.
    """
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(tree.parents.tolist()):
        children.setdefault(parent, []).append(node)
    kept: list[int] = []

    def visit(parent: int) -> None:
        for node in children.get(parent, ()):
            if grammar.accept(int(tree.tokens[node])):
                kept.append(node)
                visit(node)
                grammar.rollback(1)

    visit(ROOT)
    return tree if len(kept) == len(tree) else tree.part(np.array(sorted(kept), np.int32))
