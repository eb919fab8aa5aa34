"""Fair shares by virtual token counters (Sheng et al., "Fairness in serving large language models", OSDI 2024).

Every owner has a counter of the service it got: prompt tokens when a request is admitted, generated tokens as they come, each with
its weight. Whenever there is room, the owner with the smallest counter has its first waiting request admitted. An owner that
comes back to the queue is lifted to the smallest counter there, so that idle time is no credit.
"""

from __future__ import annotations

from dataclasses import dataclass

from headrace.core.policy import SequenceView, Steadiness, StepPlan, View
from headrace.engine.policies.chunked import Chunked


@dataclass(slots=True)
class _Account:
    """What has been charged for one sequence."""

    owner: str
    decoded: int = 0
    prompt_charged: bool = False
    due: bool = False
    """Whether the last plan gives it a token: one that is gone at the next view got it and left."""


class Vtc:
    """Admission by counters, steps as in chunked prefill. Nobody who runs is displaced for another's sake.

    The counters are the policy's own state, brought up to date from each view before it is used. Both calls read the
    view alone otherwise, and a second call on the same view changes nothing.

    Args:
        prompt_weight, decode_weight: what a prompt token and a generated token count for.
    """

    steady: Steadiness = "never"  # the counters follow every single step

    def __init__(self, prompt_weight: float = 1.0, decode_weight: float = 2.0) -> None:
        self._prompt_weight, self._decode_weight = prompt_weight, decode_weight
        self._inner = Chunked()
        self.counters: dict[str, float] = {}
        self._accounts: dict[int, _Account] = {}
        self._queued: set[str] = set()
        self._last_left: str | None = None

    def admit(self, view: View) -> list[int]:
        self._update(view)
        places = view.limits.max_sequences - sum(s.width for s in view.running)
        room = view.free_slots - sum(s.pending + s.width for s in view.running)
        lines: dict[str, list[SequenceView]] = {}
        for sequence in view.waiting:
            lines.setdefault(sequence.owner, []).append(sequence)
        counters = {owner: self.counters[owner] for owner in lines}
        admitted: list[int] = []
        while lines:
            owner = min(lines, key=lambda name: (counters[name], name))
            sequence = lines[owner][0]
            need = sequence.pending + sequence.width
            alone = not view.running and not admitted
            if sequence.width > places or (need > room and not alone):
                break
            admitted.append(sequence.id)
            places -= sequence.width
            room -= need
            if not self._accounts[sequence.id].prompt_charged:
                counters[owner] += self._prompt_weight * _prompt(sequence)
            lines[owner].pop(0)
            if not lines[owner]:
                del lines[owner]
        return admitted

    def plan(self, view: View) -> StepPlan:
        self._update(view)
        plan = self._inner.plan(view)
        planned = dict(plan.chunks)
        for sequence in view.running:
            self._accounts[sequence.id].due = planned.get(sequence.id, 0) >= sequence.pending
        return plan

    def _update(self, view: View) -> None:
        """Charge what has happened since the last view, and lift the owners that have joined the queue."""
        present: dict[int, _Account] = {}
        for sequence in view.running:
            account = self._known(sequence)
            if not account.prompt_charged:
                account.prompt_charged = True
                self._charge(account.owner, self._prompt_weight * _prompt(sequence))
            self._charge(account.owner, self._decode_weight * (sequence.decoded - account.decoded))
            account.decoded = sequence.decoded
            present[sequence.id] = account
        waiting_ids = {s.id for s in view.waiting}
        for number, account in self._accounts.items():
            if account.due and number not in present and number not in waiting_ids:
                self._charge(account.owner, self._decode_weight)
        waiting = {s.owner for s in view.waiting}
        left = self._queued - waiting
        if left:
            self._last_left = max(left, key=lambda name: (self.counters[name], name))
        self._queued &= waiting
        for sequence in view.waiting:
            joins = sequence.id not in self._accounts and sequence.owner not in self._queued
            account = self._known(sequence)
            if joins:
                self._lift(sequence.owner)
            self._queued.add(sequence.owner)
            present[sequence.id] = account
        self._accounts = present

    def _known(self, sequence: SequenceView) -> _Account:
        account = self._accounts.get(sequence.id)
        if account is None:
            # A fork brings tokens that its leader's prompt paid for; what it generates itself is counted from here.
            account = _Account(sequence.owner, prompt_charged=sequence.decoded > 0)
            self.counters.setdefault(sequence.owner, 0.0)
        return account

    def _lift(self, owner: str) -> None:
        others = [self.counters[name] for name in self._queued]
        if not others and self._last_left is not None:
            others = [self.counters[self._last_left]]
        if others:
            self.counters[owner] = max(self.counters[owner], min(others))

    def _charge(self, owner: str, service: float) -> None:
        self.counters[owner] += service


def _prompt(sequence: SequenceView) -> int:
    return sequence.context + sequence.pending - sequence.decoded
