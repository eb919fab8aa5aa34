"""What every driver shares: the loop that reads one JSON object a line and answers with one.

Drivers run in the virtual environment of the engine they drive, so this folder imports nothing of headrace. A request is
``{"op": NAME, ...}`` and its answer ``{"ok": true, ...}`` or ``{"ok": false, "error": TEXT}``; the operations are the methods
of :class:`Engine`. Whatever libraries print goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from abc import ABC, abstractmethod
from typing import Any


class Engine(ABC):
    """One engine that answers whole batches. Those that need a format of their own override :meth:`prepare`."""

    def prepare(self, checkpoint: str, out: str, precision: str) -> None:  # noqa: B027 (most read the checkpoint as it is)
        """Write the checkpoint (a transformers folder) in the engine's own format to the folder ``out``, which exists."""

    @abstractmethod
    def load(self, model: str, precision: str, threads: int, sequences: int, context: int) -> dict[str, Any]:
        """Load what :meth:`prepare` wrote, for at most ``sequences`` at once of ``context`` tokens each.

        Returns:
            At least ``ran``: in which precision the engine really computes, in words. ``url``: its HTTP API, if it has one.
        """

    @abstractmethod
    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        """``new`` greedy tokens for each prompt (all of one length), end-of-text ignored."""

    def close(self) -> None:  # noqa: B027 (most have nothing to stop)
        """Stop what the engine started."""


class OpenLoopEngine(Engine):
    """An engine that also takes requests while others run."""

    @abstractmethod
    def replay(self, requests: list[dict[str, Any]], cutoff_s: float) -> list[dict[str, Any]]:
        """Submit each request ``at_s`` seconds from now, however far behind the engine is, and give up ``cutoff_s`` seconds from now.

        What is open then is cancelled, so that the engine is idle for whatever comes next.

        Returns:
            A row per request: ``id``, ``at_s``, ``first_s`` and ``end_s`` (seconds from the start) where it came that far, ``tokens``.
        """


def run(engine: Engine) -> None:
    """Answer requests until standard input ends or asks to close."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        op = request.pop("op")
        try:
            answer = {"ok": True, **_answer(engine, op, request)}
        except Exception as error:
            traceback.print_exc()
            answer = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        if op == "close":
            break
    # Thread pools of inference libraries are known to hang the interpreter's own way out.
    os._exit(0)


def _answer(engine: Engine, op: str, request: dict[str, Any]) -> dict[str, Any]:
    started = time.perf_counter()
    if op == "generate":
        tokens = engine.generate(**request)
        return {"seconds": time.perf_counter() - started, "tokens": tokens}
    if op == "replay":
        if not isinstance(engine, OpenLoopEngine):
            raise ValueError("this engine has no open-loop mode: drive it over HTTP")
        return {"rows": engine.replay(**request)}
    if op in ("prepare", "load", "close"):
        return getattr(engine, op)(**request) or {}
    raise ValueError(f"no operation {op!r}")
