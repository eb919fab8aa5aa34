"""What an answer looks like on the wire, whoever asked for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from headrace.server.api.feed import Piece


class Shape(Protocol):
    """How an answer is written: as one object, or as the chunks of a stream."""

    def reply(self, pieces: Sequence[Piece], usage: dict[str, Any]) -> dict[str, Any]:
        """The whole answer."""

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """The events for a piece."""

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The last event of a stream, when the client asked for usage."""
