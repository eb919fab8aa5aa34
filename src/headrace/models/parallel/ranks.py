"""The other ranks as rank 0 sees them: processes of its own, a pipe to each, and a line that ends when it does."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from headrace.core.errors import EngineUnavailable, HeadraceError
from headrace.models.parallel.group import Group, leave

START_TIMEOUT_S = 120.0
"""For a process to start and import torch, on a busy machine too."""
END_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Setup:
    """What a rank is told at its start; everything else it learns from the checkpoint, as rank 0 does.

    Attributes:
        rank, size: its number among how many.
        store: file at which the ranks meet.
        device: as configured: "auto", "cpu" or "cuda".
        threads: CPU threads it may use.
        load: arguments of :func:`headrace.models.load.load`.
        linears, quantize: as configured.
        slots: arguments of :func:`headrace.models.parallel.room.shared_slots`.
        runner: arguments of :class:`headrace.models.runner.ModelRunner`.
    """

    rank: int
    size: int
    store: Path
    device: str
    threads: int
    load: dict[str, Any]
    linears: str
    quantize: str | None
    slots: dict[str, Any]
    runner: dict[str, Any]


@dataclass(slots=True)
class _Other:
    """One of the other ranks."""

    rank: int
    process: subprocess.Popen[bytes]
    pipe: Connection


@dataclass(slots=True)
class _Held:
    """What must be let go of, apart from :class:`Ranks` so that a finalizer can do it."""

    others: list[_Other] = field(default_factory=list)
    lifeline: int = -1
    folder: str = ""
    closing: bool = False


Lost = Callable[[str], None]


class Ranks:
    """Starts ranks 1 to ``size - 1`` and keeps hold of them.

    They end when :meth:`close` is called, when this object is collected, and when this process ends, however it ends: each
    watches a pipe whose other end only this process holds.

    Args:
        setup: what rank 0 knows; each gets its own number.
        on_lost: called in a thread of ours, with a sentence, when a rank ends that was not told to; by default the next step fails.
    """

    def __init__(self, setup: Setup, on_lost: Lost | None = None) -> None:
        self.size = setup.size
        self.group = Group(0, setup.size)
        self.loss: str | None = None
        self._on_lost = on_lost
        self._held = _Held()
        self._finalizer = weakref.finalize(self, _release, self._held)
        self._held.folder = tempfile.mkdtemp(prefix="headrace-")  # for this user's eyes only
        self.store = Path(self._held.folder) / "ranks"
        self._start(setup)

    def _start(self, setup: Setup) -> None:
        watched, self._held.lifeline = os.pipe()
        try:
            for rank in range(1, self.size):
                near, far = Pipe()
                process = _spawn(far.fileno(), watched, setup.threads)
                far.close()
                self._held.others.append(_Other(rank, process, near))
        except OSError as error:
            self.close()
            raise EngineUnavailable(f"rank {rank} of {self.size} cannot be started: {error.strerror}") from error
        finally:
            os.close(watched)
        try:
            self.hear("started", START_TIMEOUT_S)
            for other in self._held.others:
                other.pipe.send(replace(setup, rank=other.rank, store=self.store))
        except BaseException:
            self.close()
            raise
        myself = weakref.ref(self)
        for other in self._held.others:
            threading.Thread(target=_watch, args=(myself, other), name="headrace-rank", daemon=True).start()

    def hear(self, word: str, timeout_s: float | None = None) -> list[Any]:
        """Wait until every rank has said ``word``.

        Returns:
            What each said with it.

        Raises:
            HeadraceError: a rank's own error, or that it has ended or says nothing.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        heard = []
        for other in self._held.others:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                if not other.pipe.poll(left):
                    raise EngineUnavailable(f"rank {other.rank} of {self.size} did not start within {timeout_s:.0f} s")
                said, content = other.pipe.recv()
            except (EOFError, OSError) as error:
                raise self._gone(other) from error
            if said == "failed":
                raise content
            assert said == word, f"rank {other.rank} said {said!r} instead of {word!r}"
            heard.append(content)
        return heard

    def tell(self, message: memoryview) -> None:
        """Send ``message`` to every rank; raises :class:`EngineUnavailable` when one is gone."""
        for other in self._held.others:
            try:
                other.pipe.send_bytes(message)
            except OSError as error:
                raise self._gone(other) from error

    def check(self, patience_s: float = 1.0) -> None:
        """Raise :class:`EngineUnavailable` when a rank is gone, or goes within ``patience_s``: its sockets close before it ends."""
        deadline = time.monotonic() + patience_s
        for other in self._held.others:
            with contextlib.suppress(subprocess.TimeoutExpired):
                other.process.wait(max(0.0, deadline - time.monotonic()))
                raise self._gone(other)

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """While all ranks load: whatever fails here ends the others, and what failed on another is raised in its place."""
        try:
            yield
        except BaseException as error:
            try:
                if isinstance(error, RuntimeError):  # a collective broken off from the far side
                    self.check()
            finally:
                self.close()
            raise

    def close(self) -> None:
        """End the other ranks and leave their group; harmless when they have ended."""
        if self._finalizer.alive:
            self._finalizer()
            leave()

    def _gone(self, other: _Other) -> HeadraceError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            other.process.wait(END_TIMEOUT_S)
        with contextlib.suppress(EOFError, OSError):
            while other.pipe.poll(0):
                said, content = other.pipe.recv()
                if said == "failed" and isinstance(content, HeadraceError):
                    return content
        return EngineUnavailable(_obituary(other, self.size), code="rank_lost")


def _obituary(other: _Other, size: int) -> str:
    return (
        f"rank {other.rank} of {size} (process {other.process.pid}) ended with exit code {other.process.returncode}: "
        "the model has lost a part and must be loaded again"
    )


def _spawn(pipe: int, watched: int, threads: int) -> subprocess.Popen[bytes]:
    """A Python process that runs :mod:`headrace.models.parallel.follower` over the two descriptors.

    Not by multiprocessing: its spawned children import the user's main module again, and a daemonic process, which the engine's
    is, may have none.
    """
    return subprocess.Popen(
        [sys.executable, "-m", "headrace.models.parallel.follower", str(pipe), str(watched)],
        pass_fds=(pipe, watched),
        stdin=subprocess.DEVNULL,
        stdout=2,  # what it prints is for the log, not for whoever reads our output
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )


def _watch(ranks: weakref.ref[Ranks], other: _Other) -> None:
    """Wait for a rank's end and say so unless it was told to."""
    other.process.wait()
    alive = ranks()
    if alive is None or alive._held.closing:
        return
    alive.loss = _obituary(other, alive.size)
    if alive._on_lost is not None:
        alive._on_lost(alive.loss)


def _release(held: _Held) -> None:
    held.closing = True
    if held.lifeline >= 0:
        os.close(held.lifeline)
        held.lifeline = -1
    for other in held.others:
        other.pipe.close()
    for other in held.others:
        try:
            other.process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            other.process.kill()
            other.process.wait()
    shutil.rmtree(held.folder, ignore_errors=True)
