"""The share of recent requests that met their targets, by service class. Pure."""

from __future__ import annotations

from collections import deque

from headrace.server.api.outcome import Outcome

WINDOW = 500
"""Requests of a class that its share is taken over."""


class Attainment:
    """Remembers the latest verdicts of every class; classes are the server's own, so there are few."""

    def __init__(self, window: int = WINDOW) -> None:
        self._window = window
        self._verdicts: dict[str, deque[bool]] = {}

    def count(self, outcome: Outcome) -> None:
        """Take in a request that has ended; one without targets, or that its client gave up in time, does not count."""
        if outcome.attained is not None:
            self._verdicts.setdefault(outcome.slo_class, deque(maxlen=self._window)).append(outcome.attained)

    def classes(self) -> tuple[str, ...]:
        """Classes with a verdict."""
        return tuple(self._verdicts)

    def recent(self, name: str) -> tuple[int, int]:
        """(met, all) of the latest requests of a class."""
        verdicts = self._verdicts.get(name, ())
        return sum(verdicts), len(verdicts)
