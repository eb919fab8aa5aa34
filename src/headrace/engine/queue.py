"""The waiting line: ordered by urgency, with requests whose grammar is still being compiled on the side."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from typing import Any

from headrace.core.order import urgency
from headrace.engine.sequence import Sequence


class WaitingQueue:
    """Sequences that are not running, most urgent first (priority, arrival, id)."""

    def __init__(self) -> None:
        self.ready: list[Sequence] = []
        self._compiling: dict[Sequence, Future[Any]] = {}

    def __len__(self) -> int:
        return len(self.ready) + len(self._compiling)

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.ready
        yield from self._compiling

    def push(self, sequence: Sequence) -> None:
        """Put a sequence in its place."""
        insort(self.ready, sequence, key=urgency)

    def push_compiling(self, sequence: Sequence, grammar: Future[Any]) -> None:
        """Hold a sequence back until ``grammar`` is compiled."""
        self._compiling[sequence] = grammar

    def discard(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it stands, if it stands here at all."""
        if self._compiling.pop(sequence, None) is None and sequence in self.ready:
            self.ready.remove(sequence)

    def compiled(self, patience_s: float = 0.0) -> list[tuple[Sequence, Future[Any]]]:
        """Take out the sequences whose compilation has ended, waiting up to ``patience_s`` when nothing else is ready."""
        if not self._compiling:
            return []
        if patience_s and not self.ready:
            wait_for(self._compiling.values(), timeout=patience_s, return_when="FIRST_COMPLETED")
        ended = [(s, f) for s, f in self._compiling.items() if f.done()]
        for sequence, _ in ended:
            del self._compiling[sequence]
        return ended
