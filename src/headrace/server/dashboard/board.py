"""Requests as the dashboard shows them: the open ones as they stand, the latest ones as they ended. No texts, no names of clients."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from headrace.server.slo.standing import WORST_FIRST, Standing, ended_as, standing

if TYPE_CHECKING:
    from headrace.server.api.feed import Feed

COLUMNS = (
    "number", "class", "phase", "standing", "arrival", "scheduled", "first", "end", "prompt", "tokens", "ttft_ms", "tpot_ms",
    "drafted", "accepted",
)  # fmt: skip
ENDED_KEPT = 400
OPEN_SHOWN = 300
NO_LIMIT = 1 << 31

Row = tuple[object, ...]


class Board:
    """Follows requests from submission to end.

    Args:
        number: gives the next revision.
        now: seconds on the clock of requests.
        ended_kept, open_shown: how many requests that have ended are remembered, and how many open ones are shown (the oldest).
    """

    def __init__(
        self,
        number: Callable[[], int],
        now: Callable[[], float],
        *,
        ended_kept: int = ENDED_KEPT,
        open_shown: int = OPEN_SHOWN,
    ) -> None:
        self._number, self._now, self._shown = number, now, open_shown
        self._started = now()
        self._open: dict[Feed, int] = {}
        self._ended: deque[tuple[int, Row]] = deque(maxlen=ended_kept)
        self._count = 0

    def time(self) -> float:
        """Seconds since the board was put up, in which all its times are."""
        return self._since(self._now()) or 0.0

    def opened(self, feed: Feed) -> None:
        """A request was submitted."""
        self._count += 1
        self._open[feed] = self._count

    def closed(self, feed: Feed) -> None:
        """It has ended, whichever way."""
        number = self._open.pop(feed, None)
        if number is None:
            return
        outcome = feed.outcome()
        verdict = outcome.attained
        ended: Standing = "none" if verdict is None else "met" if verdict else "missed"
        phase = "finished" if outcome.complete else "failed" if "error" in outcome.finish_reasons else "cancelled"
        row = self._row(feed, number, phase, ended, feed.choices[0].timing.first_scheduled, self._now())
        self._ended.append((self._number(), row))

    def ended(self, after: int) -> list[Row]:
        """Requests that ended with a revision above ``after``."""
        return [row for revision, row in self._ended if revision > after]

    def open(self, prefilling: Mapping[str, float]) -> tuple[list[Row], Counter[str], Counter[tuple[str, str]]]:
        """The open requests.

        Args:
            prefilling: request id -> when it was first scheduled, of those without a token.

        Returns:
            Rows of the oldest ones; how many requests there are in each phase; how many of each (class, standing) among the rows.
        """
        phases: Counter[str] = Counter()
        standings: Counter[tuple[str, str]] = Counter()
        rows: list[Row] = []
        now = self._now()
        for feed, number in self._open.items():
            phase, scheduled = _phase(feed, prefilling)
            phases[phase] += 1
            if len(rows) < self._shown:
                stands = _worst(feed, now)
                standings[feed.slo_class, stands] += 1
                rows.append(self._row(feed, number, phase, stands, scheduled, None))
        return rows, phases, standings

    def _row(self, feed: Feed, number: int, phase: str, stands: str, scheduled: float | None, end: float | None) -> Row:
        outcome = feed.outcome()
        first = min((t.first_token for t in outcome.timings if t.first_token is not None), default=None)
        times = (feed.requests[0].arrival, scheduled, first, end)
        paces = (None if ms is None else round(ms, 1) for ms in (outcome.ttft_ms, outcome.tpot_ms))
        return (
            number, feed.slo_class, phase, stands, *map(self._since, times), outcome.prompt_tokens, outcome.completion_tokens,
            *paces, outcome.drafted, outcome.accepted,
        )  # fmt: skip

    def _since(self, at: float | None) -> float | None:
        return None if at is None else round(at - self._started, 3)


def _phase(feed: Feed, prefilling: Mapping[str, float]) -> tuple[str, float | None]:
    """Phase of a request, and when it was first scheduled as far as that is known."""
    scheduled = feed.choices[0].timing.first_scheduled
    if any(choice.timing.first_token is not None for choice in feed.choices):
        return "decode", scheduled
    known = [prefilling[request.id] for request in feed.requests if request.id in prefilling]
    return ("prefill", min(known)) if known else ("queued", None)


def _worst(feed: Feed, now: float) -> Standing:
    """The worst standing of the choices."""
    slo, limit = feed.requests[0].slo, feed.requests[0].params.max_tokens or NO_LIMIT
    found = {
        ended_as(slo, choice.timing) if choice.done else standing(slo, choice.timing, limit, now)
        for choice in feed.choices
    }
    return next(word for word in WORST_FIRST if word in found)
