"""What a sweep can replay on: a server over HTTP, or a peer's engine that is fed inside its own process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from headrace.bench.openloop.shots import OnRow, Replayed, Shot, over_http, row_of


class Process(Protocol):
    """Who runs behind a system: a server of ours or a peer's session."""

    def pause(self) -> None:
        """Stop its processes where they are."""

    def resume(self) -> None:
        """Let them go on."""

    def close(self) -> None:
        """End them."""


class System(Protocol):
    """One of the compared systems."""

    @property
    def name(self) -> str:
        """How rows call it."""

    @property
    def process(self) -> Process:
        """Who runs behind it."""

    def replay(self, shots: Sequence[Shot], *, cutoff_s: float, on_row: OnRow = ...) -> Replayed:
        """Send ``shots`` when they are due; see :func:`headrace.bench.openloop.shots.over_http`. Raises when the system is lost."""


class HTTPSystem:
    """A server that speaks OpenAI's API."""

    def __init__(self, name: str, url: str, model: str, process: Process) -> None:
        self.name, self.process = name, process
        self._url, self._model = url, model

    def replay(
        self,
        shots: Sequence[Shot],
        *,
        cutoff_s: float,
        concurrency: int | None = None,
        gaps: bool = False,
        on_row: OnRow = lambda row: None,
    ) -> Replayed:
        """Over HTTP, open or closed loop; see :func:`headrace.bench.openloop.shots.over_http`."""
        return over_http(
            self._url, self._model, shots, cutoff_s=cutoff_s, concurrency=concurrency, gaps=gaps, on_row=on_row
        )


class SessionSystem:
    """A peer without a server: its process takes the whole schedule and keeps the times itself, so no HTTP is in them."""

    def __init__(self, name: str, session: Any) -> None:
        self.name, self.process = name, session

    def replay(self, shots: Sequence[Shot], *, cutoff_s: float, on_row: OnRow = lambda row: None) -> Replayed:
        """Through the session's own replay; raises its error when the peer cannot go on."""
        wanted = [{"id": s.id, "at_s": s.at_s, "prompt": list(s.prompt), "new": s.new} for s in shots]
        answers = {answer["id"]: answer for answer in self.process.replay(wanted, cutoff_s)}
        rows = []
        for shot in shots:
            rows.append(row_of(shot, line_of(shot, answers.get(shot.id), cutoff_s)))
            on_row(rows[-1])
        return Replayed(rows, {})


def line_of(shot: Shot, answer: dict[str, Any] | None, cutoff_s: float) -> dict[str, Any]:
    """A session's answer in the form of the HTTP client's line; what ended after the cut-off does not count as finished."""
    found = answer or {}
    end = found.get("end_s")
    finished = end is not None and end <= cutoff_s and found.get("tokens", 0) >= shot.new
    sent = found.get("at_s", shot.at_s)
    return {
        "at_s": shot.at_s,
        "sent_s": sent,
        "first_s": found.get("first_s"),
        "last_s": end,
        "end_s": cutoff_s if end is None else end,
        "tokens": found.get("tokens", 0),
        "finished": finished,
        "error": None if finished else found.get("error") or "cut off",
    }
