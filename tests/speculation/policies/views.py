"""Views for tests of policies: sequences, costs and drafts made up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from tests import sequences

from headrace.core.batch import StepShape
from headrace.core.policy import Limits, View
from headrace.core.speculation import DraftTree, Floats, Outlook


@dataclass
class Fake(sequences.Fake):
    """One that has been decoding for a while, unless it is said otherwise."""

    decoded: int = 10
    context: int = 100
    remaining: int = 100
    first_token: float | None = 1.0


@dataclass
class Machine:
    """A machine of straight lines: milliseconds of a step, of a row, and of a layer of drafting."""

    step_ms: float = 30.0
    row_ms: float = 0.2
    layer_ms: float = 5.0

    def cost(self, shape: StepShape) -> float:
        return self.step_ms + self.row_ms * (shape.prefill_tokens + shape.decode_tokens)

    def draft_ms(self, source: str, sequences: int, depth: int, width: int) -> float:
        return self.layer_ms * depth if sequences else 0.0

    def observe(self, source: str, sequences: int, depth: int, width: int, ms: float) -> None:
        pass


@dataclass
class Known:
    """Acceptance that is known: the same at every node, by sequence."""

    rates: dict[int, float] = field(default_factory=dict)
    usual: float = 0.8

    def survival(self, sequences: Sequence[int], source: str, depth: int) -> Floats:
        rates = np.array([self.rates.get(s, self.usual) for s in sequences])
        return rates[None, :] ** np.arange(1, depth + 1)[:, None]

    def calibrated(self, sequence: int, tree: DraftTree) -> DraftTree:
        return tree

    def observe(self, sequence: int, tree: DraftTree, accepted: Sequence[int]) -> None:
        pass

    def forget(self, sequence: int) -> None:
        pass


def view(
    running: Sequence[Fake],
    *,
    now: float = 2.0,
    machine: Machine | None = None,
    known: Known | None = None,
    limits: Limits | None = None,
    waiting: Sequence[Fake] = (),
) -> View:
    """A view with a profile and one drafter."""
    costs = machine or Machine()
    return View(
        now=now,
        running=running,
        waiting=waiting,
        free_slots=100_000,
        total_slots=100_000,
        limits=limits or Limits(64, 512, 512),
        profile=costs,
        outlook=Outlook(("draft",), costs, known or Known()),
    )


def drafted(state: View, depths: dict[int, int], rate: float = 0.8) -> View:
    """The view after drafting chains that are accepted at ``rate`` a node."""
    trees = {n: DraftTree.chain(range(d), [rate] * d, "draft") for n, d in depths.items() if d}
    return replace(state, candidates=trees)
