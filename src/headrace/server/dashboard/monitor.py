"""What the dashboard knows: requests, attainment and steps of the last minutes, in rings of a fixed size."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
import uuid
from typing import TYPE_CHECKING, Any, Protocol

from headrace.core.errors import HeadraceError
from headrace.core.outputs import EngineStats
from headrace.core.protocols import Service
from headrace.server.dashboard import board, steps
from headrace.server.dashboard.board import Board
from headrace.server.dashboard.steps import StepRing
from headrace.server.slo.attainment import Attainment
from headrace.server.slo.classes import SLOClasses
from headrace.version import __version__

if TYPE_CHECKING:
    from headrace.server.api.feed import Feed

log = logging.getLogger(__name__)

SAMPLE_S = 1.0
PHASES = ("queued", "prefill", "decode")
VERDICTS = ("met", "risk", "missed")


class Watched(Protocol):
    """The server, as far as it is watched: whether it is ready, and the engine behind it."""

    @property
    def state(self) -> str:
        """ "loading", "ready", "draining" and so on."""

    @property
    def service(self) -> Service:
        """Whose numbers are sampled."""


class Monitor:
    """Collects while the server runs; the cost is one message to the engine a second.

    Args:
        classes: whose targets are shown beside their attainment.
    """

    def __init__(self, classes: SLOClasses) -> None:
        self._classes = classes
        self._revision = 0
        self._numbers = itertools.count(1)
        self._epoch = uuid.uuid4().hex[:12]
        self.attainment = Attainment()
        self.board = Board(self._next, time.monotonic)
        self.steps = StepRing(self._next)
        self._prefilling: dict[str, float] = {}
        self._ended = 0

    def _next(self) -> int:
        self._revision = next(self._numbers)
        return self._revision

    def opened(self, feed: Feed) -> None:
        """A request was submitted."""
        self.board.opened(feed)

    def closed(self, feed: Feed) -> None:
        """A request has ended."""
        self.board.closed(feed)
        self.attainment.count(feed.outcome())
        self._ended += 1

    def sample(self, stats: EngineStats) -> None:
        """Take in a snapshot of the engine."""
        self._prefilling = stats.prefilling
        self.steps.add(self.board.time(), stats)

    async def run(self, serving: Watched) -> None:
        """Sample until cancelled."""
        while True:
            await asyncio.sleep(SAMPLE_S)
            if serving.state not in ("ready", "draining"):
                continue
            try:
                self.sample(await serving.service.stats())
            except HeadraceError:
                continue
            except Exception:
                log.exception("the engine's numbers could not be sampled")

    def snapshot(self, serving: Watched, after: int) -> dict[str, Any]:
        """All that is new since revision ``after``, and the open requests as they are. At most some hundred rows.

        ``epoch`` changes when the server restarts, which also starts revisions anew.
        """
        rows, phases, standings = self.board.open(self._prefilling)
        state = serving.state
        return {
            "epoch": self._epoch,
            "revision": self._revision,
            "now": self.board.time(),
            "state": state,
            "model": serving.service.card.name if state in ("ready", "draining") else None,
            "version": __version__,
            "step_limit": self.steps.step_limit,
            "phases": {phase: phases[phase] for phase in PHASES},
            "ended": self._ended,
            "classes": [self._class(name, standings) for name in self._names(standings)],
            "requests": {"columns": board.COLUMNS, "open": rows, "ended": self.board.ended(after)},
            "steps": {"columns": steps.COLUMNS, "rows": self.steps.rows(after)},
        }

    def _names(self, standings: dict[tuple[str, str], int]) -> list[str]:
        """The server's classes, then others that requests have."""
        seen = (*self.attainment.classes(), *(name for name, _ in standings))
        return list(dict.fromkeys((*self._classes.classes, *seen)))

    def _class(self, name: str, standings: dict[tuple[str, str], int]) -> dict[str, Any]:
        slo = self._classes.classes.get(name)
        met, judged = self.attainment.recent(name)
        return {
            "name": name,
            "ttft_ms": slo.ttft_ms if slo else None,
            "tpot_ms": slo.tpot_ms if slo else None,
            "met": met,
            "judged": judged,
            "open": {verdict: standings.get((name, verdict), 0) for verdict in (*VERDICTS, "none")},
        }
