"""A sequence that draws in a step: it takes its tokens one by one, as far as its draft carries them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from headrace.core.errors import HeadraceError
from headrace.core.outputs import FinishReason, SequenceDelta
from headrace.engine.sampling.sampler import Draw, Sampled
from headrace.engine.sequence import Sequence
from headrace.engine.verify import Walk

if TYPE_CHECKING:
    from headrace.core.batch import Ints
    from headrace.core.speculation import DraftTree

NONE = np.empty(0, np.int32)


class Head:
    """Where a sequence's draws stand, and what came of them.

    Every drawn token is appended to the sequence (and its grammar) at once, so that the next draw sees it; the first
    token that ends the sequence is the last.

    Attributes:
        sequence: who draws.
        tree: the draft that the step verifies, or None.
        slots: int32[1 + k] of the root and the tree's k nodes.
        walk: the way down the tree.
        delta: the tokens so far.
        error: what went wrong, if anything.
    """

    __slots__ = ("_row", "delta", "error", "sequence", "slots", "tree", "walk")

    def __init__(self, sequence: Sequence, row: int, tree: DraftTree | None = None, slots: Ints = NONE) -> None:
        self.sequence, self.tree, self.slots = sequence, tree, slots
        self.walk = Walk(tree)
        self.error: HeadraceError | None = None
        self.delta = SequenceDelta(sequence.request.id, sequence.index)
        if sequence.params.logprobs is not None:
            self.delta.logprobs = []
        self._row = row

    def draw(self) -> Draw:
        """What to draw next, from the row of the last accepted node."""
        sequence = self.sequence
        return Draw(
            row=self._row + 1 + self.walk.node,
            params=sequence.request.params,
            seed=sequence.draw_key,
            index=len(sequence.output),
            prompt=sequence.request.prompt,
            output=sequence.output,
            stop_ids=sequence.stop_ids,
            grammar=sequence.grammar,
        )

    def take(self, outcome: Sampled) -> bool:
        """Append what was drawn; whether there is more to draw."""
        self.error = outcome.error
        if outcome.error is not None:
            return False
        sequence, delta = self.sequence, self.delta
        sequence.append(outcome.token)
        delta.tokens.append(outcome.token)
        if delta.logprobs is not None and outcome.logprobs is not None:
            delta.logprobs.append(outcome.logprobs)
        delta.reason = _reason(sequence, outcome.token)
        return delta.reason is None and self.walk.step(outcome.token)


def _reason(sequence: Sequence, token: int) -> FinishReason | None:
    """Why ``token``, just appended, ends the sequence; None when it goes on."""
    if token in sequence.stop_ids:
        return "stop"
    if sequence.grammar is not None and (not sequence.grammar.accept(token) or sequence.grammar.terminated):
        return "stop"
    return "length" if len(sequence.output) >= sequence.max_tokens else None
