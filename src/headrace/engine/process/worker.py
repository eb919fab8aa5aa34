"""The engine's side of the process boundary: a loop that takes messages between steps and sends back deltas.

Messages to the engine: ``("add", Request)``, ``("cancel", request id, index | None)``, ``("stats",)``, ``("close",)``.
Messages from it: ``("ready", ModelCard, Limits)``, ``("failed", HeadraceError)``, ``("deltas", [SequenceDelta])``,
``("stats", EngineStats)``. They are pickled between two processes of our own; nothing a client wrote is unpickled.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from headrace.core.errors import HeadraceError
from headrace.core.outputs import SequenceDelta
from headrace.engine.engine import Engine


def run_worker(connection: Connection, build: Callable[[], Engine]) -> None:
    """Build an engine, say so, and serve until told to close or until the other side is gone."""
    # Ctrl-C and a service manager's SIGTERM reach the whole group; the server drains its requests and then closes us.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(EOFError, BrokenPipeError):  # the server is gone: there is nobody left to serve
        try:
            engine = build()
        except HeadraceError as error:
            connection.send(("failed", error))
            return
        connection.send(("ready", engine.card, engine.limits))
        try:
            while _take_messages(connection, engine):
                deltas = engine.step()
                if deltas:
                    connection.send(("deltas", deltas))
        finally:
            engine.close()


def _take_messages(connection: Connection, engine: Engine) -> bool:
    """Handle what has arrived, waiting when there is nothing else to do; False once told to close."""
    while connection.poll(0 if engine.busy else None):
        message = connection.recv()
        if message[0] == "close":
            return False
        _handle(connection, engine, message)
    return True


def _handle(connection: Connection, engine: Engine, message: tuple[Any, ...]) -> None:
    match message:
        case ("add", request):
            try:
                engine.add(request)
            except HeadraceError as error:
                refused = SequenceDelta(request.id, index=0, reason="error", error=error)
                others = [SequenceDelta(request.id, i, reason="error", error=error) for i in range(1, request.params.n)]
                connection.send(("deltas", [refused, *others]))
        case ("cancel", request_id, index):
            engine.cancel(request_id, index)
        case ("stats",):
            connection.send(("stats", engine.stats()))
        case _:
            raise ValueError(f"unknown message {message[0]!r}")
