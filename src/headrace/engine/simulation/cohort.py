"""Simulated sequences that decode in step with each other, advanced together: a step of all of them costs no more than one.

While every member gets one token a step, nothing about a member depends on anything but how many steps have passed, so
that its tokens, slots and times are written down only when somebody needs them.
"""

from __future__ import annotations

from heapq import heappop, heappush
from typing import Any

from headrace.core.batch import Ints, StepShape
from headrace.engine.sequence import Sequence
from headrace.models.cache.slots import SlotPool


class PromisingPool(SlotPool):
    """A slot pool in which slots can be spoken for before it is said which.

    Attributes:
        promised: how many are.
    """

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.promised = 0

    @property
    def free(self) -> int:
        """Slots nobody references and nobody was promised."""
        return self._free - self.promised

    def redeem(self, n: int) -> Ints:
        """Take ``n`` of the promised slots."""
        self.promised -= n
        return self.take(n)


class CohortSequence(Sequence):
    """A sequence whose sizes, as a policy reads them, count the steps of its cohort that were not written down yet."""

    __slots__ = ("cohort", "joined", "stay", "written")

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.cohort: Cohort | None = None
        self.joined = self.stay = 0
        super().__init__(*arguments, **options)

    @property
    def lag(self) -> int:
        """Steps not written down."""
        return self.cohort.steps - self.joined if self.cohort is not None else 0

    @property
    def context(self) -> int:
        """Tokens whose K and V are in slots, or would be."""
        return self.written + self.lag

    @context.setter
    def context(self, value: int) -> None:
        assert self.cohort is None, "write the lag down first"
        self.written = value

    @property
    def pending(self) -> int:
        """Known tokens whose K and V are not in slots yet."""
        return self.length - self.written

    @property
    def decoded(self) -> int:
        """Tokens generated so far."""
        cohort = self.cohort
        return len(self.output) if cohort is None else len(self.output) + cohort.steps - self.joined

    @property
    def remaining(self) -> int:
        """Tokens it may still generate."""
        return self.max_tokens - self.decoded


class Cohort:
    """The members, and what a step over all of them holds.

    Args:
        pool: their slots.

    Attributes:
        steps: taken so far.
        last: clock time of the last one.
        context: the members' contexts together.
    """

    def __init__(self, pool: PromisingPool) -> None:
        self._pool = pool
        self.members: dict[int, CohortSequence] = {}
        self.steps = 0
        self.last = 0.0
        self.context = 0
        self._stays = 0
        self._ends: list[
            tuple[int, int, CohortSequence]
        ] = []  # stays are numbered, so that the end of an earlier one is told

    def __len__(self) -> int:
        return len(self.members)

    def __contains__(self, number: int) -> bool:
        return number in self.members

    def join(self, sequence: CohortSequence) -> None:
        """Take in a sequence that decodes."""
        self.context += sequence.context
        self._stays += 1
        heappush(self._ends, (self.steps + sequence.remaining, self._stays, sequence))
        sequence.joined, sequence.stay = self.steps, self._stays
        sequence.cohort = self
        self.members[sequence.id] = sequence

    def leave(self, sequence: CohortSequence) -> int:
        """Let a member go and write down its slots and context; returns the number of its tokens, which the caller adds."""
        lag = sequence.lag
        self.context -= sequence.context
        del self.members[sequence.id]
        sequence.cohort, sequence.stay = None, 0
        if lag:
            sequence.hold(self._pool.redeem(lag))
            sequence.context += lag
        return lag

    @property
    def first_end(self) -> int:
        """Steps until the first member has all its tokens."""
        self._forget()
        return self._ends[0][0] - self.steps

    def ended(self) -> list[CohortSequence]:
        """Members that have all their tokens."""
        found = []
        self._forget()
        while self._ends and self._ends[0][0] <= self.steps:
            found.append(heappop(self._ends)[2])
            self._forget()
        return found

    def _forget(self) -> None:
        """Drop the ends of stays that are over already."""
        while self._ends and self._ends[0][2].stay != self._ends[0][1]:
            heappop(self._ends)

    def shape(self, beyond: int = 0) -> StepShape:
        """Of a step over all members, ``beyond`` steps from now."""
        rows = len(self.members)
        held = self.context + beyond * rows
        return StepShape(0, rows, held, rows, held + rows)

    def advance(self, steps: int, now: float) -> None:
        """Every member gets a token in each of ``steps`` steps, the last of which ends at ``now``."""
        taken = steps * len(self.members)
        self.steps += steps
        self.last = now
        self.context += taken
        self._pool.promised += taken
