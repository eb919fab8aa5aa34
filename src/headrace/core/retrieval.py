"""How a request's decode steps read its context: whole, or the share that an index points at."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from headrace.core.errors import InvalidRequest

KVMode = Literal["full", "pq", "auto"]
KV_MODES: tuple[KVMode, ...] = ("full", "pq", "auto")

CROSSOVER = 2048
"""Tokens of context below which reading all of it was measured to be as fast (docs/pqcache.md)."""

AUTOMATIC = 8192
"""Tokens of context from which "auto" retrieves."""


@dataclass(frozen=True, slots=True)
class Retrieval:
    """A request's wish.

    Attributes:
        mode: "full" reads everything; "pq" retrieves wherever that is faster; "auto" only in long contexts.
        budget: share of the context that a decode step reads, in (0, 1]; 1 reads everything.
        above: retrieve from so many tokens of context on, in place of the mode's own number.
    """

    mode: KVMode = "full"
    budget: float = 0.1
    above: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in KV_MODES:
            raise InvalidRequest(f"kv.mode is {self.mode!r:.60}: give one of {', '.join(KV_MODES)}", field="kv.mode")
        if not (isinstance(self.budget, int | float) and math.isfinite(self.budget) and 0.0 < self.budget <= 1.0):
            raise InvalidRequest(
                f"kv.budget is {self.budget!r:.60}: give a share of the context above 0 and up to 1", field="kv.budget"
            )
        if self.above is not None and self.above < 0:
            raise InvalidRequest(f"kv.above is {self.above}: give a number of tokens of at least 0", field="kv.above")

    def applies(self, context: int) -> bool:
        """Whether a decode step over ``context`` tokens retrieves."""
        if self.mode == "full" or self.budget == 1.0:
            return False
        own = CROSSOVER if self.mode == "pq" else AUTOMATIC
        return context >= (own if self.above is None else self.above)
