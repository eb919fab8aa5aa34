"""Skip-join multi-level feedback queue: short answers first without knowing lengths (FastServe, arXiv 2305.05920).

A queue's quantum is twice that of the queue above it. A request joins the first queue whose quantum covers its prompt, for
its first step would use up the queues above at once, and sinks by one queue each time it has used the quantum of its own.
"""

from __future__ import annotations

from collections.abc import Callable

from headrace.core.policy import SequenceView, StepPlan, View
from headrace.engine.policies.ranked import admit_ranked, plan_ranked

OVERDUE = -1


class Mlfq:
    """Skip-join MLFQ, a pure function of the view: a sequence's queue follows from its prompt and its generated tokens.

    Where FastServe watches how long a job has waited, here a job is overdue while it has had less than a token per
    ``patience_s`` seconds since its arrival; overdue jobs come before all queues, first come, first served. So nobody starves, and
    no clock has to be kept per job.

    Args:
        quantum: of the first queue, in prompt tokens.
        levels: number of queues; the last has no end.
        decode_weight: prompt tokens that a generated token counts for.
        patience_s: seconds a job may wait for each token before it is overdue.
    """

    def __init__(
        self, quantum: int = 128, levels: int = 8, decode_weight: float = 8.0, patience_s: float = 10.0
    ) -> None:
        self._quantum, self._levels = quantum, levels
        self._decode_weight, self._patience_s = decode_weight, patience_s

    def admit(self, view: View) -> list[int]:
        return admit_ranked(view, self._rank(view.now))

    def plan(self, view: View) -> StepPlan:
        return plan_ranked(view, self._rank(view.now))

    def level(self, prompt: int, decoded: int) -> int:
        """The queue, 0 the first, of a job with a prompt of ``prompt`` tokens after ``decoded`` generated ones."""
        level, quantum = 0, self._quantum
        while level < self._levels - 1 and quantum < prompt:
            level, quantum = level + 1, 2 * quantum
        used = prompt + self._decode_weight * decoded
        while level < self._levels - 1 and used > quantum:
            used -= quantum
            level, quantum = level + 1, 2 * quantum
        return level

    def _rank(self, now: float) -> Callable[[SequenceView], int]:
        def rank(sequence: SequenceView) -> int:
            if now - sequence.arrival > self._patience_s * (1 + sequence.decoded):
                return OVERDUE
            prompt = sequence.context + sequence.pending - sequence.decoded
            return self.level(prompt, sequence.decoded)

        return rank
