"""Admission and plans for policies that rank sequences and let those of a better rank displace others.

A rank is any sortable value; smaller is better. Displacing goes two ways: a sequence that is outranked for a place in the step
pauses and keeps its slots; one that is outranked for slots is preempted and computes them again later.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from headrace.core.order import in_prefill
from headrace.core.policy import SequenceView, StepPlan, View

Rank = Callable[[SequenceView], Any]


def admit_ranked(view: View, rank: Rank) -> list[int]:
    """Waiting sequences by rank, while they fit beside everything that ranks as well or better.

    Only what ranks strictly worse may be displaced, so equals never displace each other in turn. Stops at the first that
    does not fit: a worse one must not overtake it for room.
    """
    running = [(rank(s), s) for s in view.running]
    admitted: list[int] = []
    places = room = 0
    for sequence in sorted(view.waiting, key=lambda s: (rank(s), s.arrival, s.id)):
        own = rank(sequence)
        firm = [s for r, s in running if r <= own]
        displaced = sum(s.context for r, s in running if r > own)
        width = sequence.width + places + sum(s.width for s in firm)
        need = sequence.pending + sequence.width + room + sum(s.pending + s.width for s in firm)
        alone = not view.running and not admitted
        if width > view.limits.max_sequences or (need > view.free_slots + displaced and not alone):
            break
        admitted.append(sequence.id)
        places += sequence.width
        room += sequence.pending + sequence.width
    return admitted


def plan_ranked(view: View, rank: Rank) -> StepPlan:
    """The best-ranked sequences that have a place, each rank whole before the next: its decodes, then its prompts in pieces."""
    chunks: list[tuple[int, int]] = []
    places, budget = view.limits.max_sequences, view.limits.max_step_tokens
    for sequence in sorted(view.running, key=lambda s: (rank(s), in_prefill(s), s.arrival, s.id)):
        size = min(sequence.pending, budget)
        if size == 0:
            break
        if sequence.width > places:
            continue
        chunks.append((sequence.id, size))
        places -= sequence.width
        budget -= size
    worst_first = sorted(view.running, key=lambda s: (rank(s), s.arrival, s.id), reverse=True)
    return StepPlan(chunks=chunks, victims=[s.id for s in worst_first])
