"""Which tokens a sequence has seen and how often: the state behind the penalties, kept up to date token by token."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class History:
    """Distinct tokens of one sequence with their counts in the output.

    A token appended to the output costs O(1); reading costs nothing.
    """

    def __init__(self, prompt: Sequence[int], output: Sequence[int]) -> None:
        seen = np.unique(np.asarray(prompt, np.int64))
        self.prompt, self.output = prompt, output
        self._used = len(seen)
        self._ids = np.zeros(2 * self._used + 64, np.int64)
        self._ids[: self._used] = seen
        self._counts = np.zeros(len(self._ids), np.float32)
        self._places = {token: place for place, token in enumerate(seen.tolist())}
        self._synced = 0
        self.step = 0  # when it was last used

    def sync(self) -> bool:
        """Count what was appended to the output since the last call; False when the output shrank, which takes a new history."""
        if len(self.output) < self._synced:
            return False
        for token in self.output[self._synced :]:
            place = self._places.get(token)
            if place is None:
                place = self._add(token)
            self._counts[place] += 1.0
        self._synced = len(self.output)
        return True

    def _add(self, token: int) -> int:
        place = self._used
        if place == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[place] = token
        self._places[token] = place
        self._used += 1
        return place

    @property
    def ids(self) -> NDArray[np.int64]:
        """int64[d] distinct tokens of prompt and output."""
        return self._ids[: self._used]

    @property
    def counts(self) -> NDArray[np.float32]:
        """float32[d] occurrences of each in the output (0: prompt only)."""
        return self._counts[: self._used]


class Histories:
    """Histories by sequence, recognised by the identity of the output list.

    They hold as much memory as the prompts, and nobody tells when a sequence ends, so one that was not asked for in ``patience`` steps
    is forgotten; it is counted anew should its sequence come back.
    """

    def __init__(self, patience: int = 64) -> None:
        self._patience = patience
        self._step = 0
        self._held: OrderedDict[int, History] = OrderedDict()

    def get(self, prompt: Sequence[int], output: Sequence[int]) -> History:
        """The history of the sequence that owns ``output``, brought up to date."""
        key = id(output)
        # A held history keeps its lists alive, so an equal id with another list can only be another key's leftover.
        history = self._held.get(key)
        if history is None or history.output is not output or history.prompt is not prompt or not history.sync():
            history = History(prompt, output)
            history.sync()
            self._held[key] = history
        self._held.move_to_end(key)
        history.step = self._step
        return history

    def begin_step(self) -> None:
        """Note that a step begins, and forget what was not used lately."""
        self._step += 1
        while self._held:
            key, oldest = next(iter(self._held.items()))
            if self._step - oldest.step <= self._patience:
                return
            del self._held[key]
