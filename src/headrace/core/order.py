"""Orders and admission that policies share. Pure functions of the view."""

from __future__ import annotations

from collections.abc import Iterable

from headrace.core.policy import SequenceView, View


def urgency(sequence: SequenceView) -> tuple[int, float, int]:
    """Sort key: lower priority value first, then first come, first served."""
    return sequence.priority, sequence.arrival, sequence.id


def in_prefill(sequence: SequenceView) -> bool:
    """True while known tokens beyond the newest one still need their K and V, or nothing was generated yet."""
    return sequence.pending > 1 or sequence.decoded == 0


def victims(running: Iterable[SequenceView]) -> list[int]:
    """Whom to preempt when slots run out: the least urgent first."""
    return [s.id for s in sorted(running, key=urgency, reverse=True)]


def admit_in_order(view: View) -> list[int]:
    """Admit waiting sequences in queue order while places and slots last.

    A sequence needs room for all its known tokens plus one, beyond what the running ones are about to write, so that a
    newcomer does not preempt those who are being served. With nothing running, the first always enters.
    """
    places = view.limits.max_sequences - sum(s.width for s in view.running)
    room = view.free_slots - sum(s.pending + s.width for s in view.running)
    admitted: list[int] = []
    for sequence in view.waiting:
        need = sequence.pending + sequence.width
        alone = not view.running and not admitted
        if sequence.width > places or (need > room and not alone):
            break
        admitted.append(sequence.id)
        places -= sequence.width
        room -= need
    return admitted
