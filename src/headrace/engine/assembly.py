"""From a plan to segments: slots are found, and drafts hung below the rows of those who decode."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from headrace.core.batch import Segment
from headrace.core.policy import StepPlan
from headrace.core.speculation import DraftTree
from headrace.engine.drafting import Drafting
from headrace.engine.kv import KVSpace
from headrace.engine.sequence import Sequence

if TYPE_CHECKING:
    from headrace.core.batch import Ints

Assembled = tuple[list[Segment], list[Sequence], list[DraftTree | None]]
"""Segments, the sequence of each, and the draft it verifies."""

_NONE = np.empty(0, np.int32)


def assemble(
    plan: StepPlan,
    running: Mapping[int, Sequence],
    space: KVSpace,
    drafting: Drafting | None,
    preempt: Callable[[Sequence], None],
) -> Assembled:
    """The segments of a step.

    Args:
        plan: who runs, how much, and what is verified.
        running: sequences by number; ``preempt`` takes them out.
        space: where slots come from.
        drafting: where the drafts are that the plan's nodes belong to.
        preempt: sends a sequence back to the queue.
    """
    segments: list[Segment] = []
    scheduled: list[Sequence] = []
    served: set[int] = set()
    for number, tokens in plan.chunks:
        sequence = running.get(number)
        if sequence is None:  # preempted for one that came before it
            continue
        slots = _room(sequence, min(tokens, sequence.pending), served, plan, running, space, preempt)
        if len(slots):
            served.add(number)
            sequence.hold(slots)
            segments.append(sequence.segment(slots))
            scheduled.append(sequence)
    trees: list[DraftTree | None] = [None] * len(segments)
    if plan.nodes and drafting is not None:  # after all chunks: a draft must not take what a token needs
        for place, sequence in enumerate(scheduled):
            nodes = plan.nodes.get(sequence.id)
            if nodes is not None and sequence.pending == 1 and sequence.output:
                tree = drafting.chosen(sequence.id, nodes[: space.available])
                if tree is not None:
                    segments[place] = _hung(segments[place], sequence, tree, space)
                    trees[place] = tree
    return segments, scheduled, trees


def _hung(segment: Segment, sequence: Sequence, tree: DraftTree, space: KVSpace) -> Segment:
    """The segment of a decoding sequence with ``tree``, for which there are slots, below its row."""
    slots = space.reserve(len(tree))
    assert slots is not None
    return sequence.tree_segment(np.concatenate([segment.write_slots, slots]), tree)


def _room(
    sequence: Sequence,
    count: int,
    served: set[int],
    plan: StepPlan,
    running: Mapping[int, Sequence],
    space: KVSpace,
    preempt: Callable[[Sequence], None],
) -> Ints:
    """Slots for ``count`` tokens of ``sequence``; fewer, perhaps none, when there is nobody left to preempt for it.

    It may preempt those who go before it in the plan's order of victims, but nobody who is in this step already.
    """
    before = itertools.takewhile(lambda number: number != sequence.id, plan.victims)
    while (slots := space.reserve(count)) is None:
        victim = next((v for v in before if v in running and v not in served), None)
        if victim is None:
            slots = space.reserve(min(count, space.available))
            return _NONE if slots is None else slots
        preempt(running[victim])
    return slots
