"""One child process and the pipe to it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

PATIENCE_S = 5.0
"""How long a process that has served, or whose pipe has ended, may take to end before it is killed."""

Message = tuple[Any, ...]


class Link:
    """One child process with a thread for each direction, so that neither side ever waits for the other's reading.

    Args:
        target: module-level function run in the child as ``target(connection, *arguments)``.
        arguments: picklable arguments for it.
        receive: called in a thread of ours with each message of the child; with ``("unsent", message, error)`` for one of ours that
            cannot be pickled; and last, once, with ``("exit", exit code)``.

    Attributes:
        process: the child.
        loaded: whether the child is known to read its messages; until then :meth:`stop` has nobody to ask and kills it.
    """

    def __init__(
        self, target: Callable[..., None], arguments: tuple[Any, ...], receive: Callable[[Message], None]
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, self._far = context.Pipe()
        self.process = context.Process(target=target, args=(self._far, *arguments), name="headrace-engine", daemon=True)
        self.loaded = False
        self._receive = receive
        self._outbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write, name="headrace-engine-write", daemon=True)

    def start(self) -> None:
        """Start the process and its two threads; raises OSError when the system has no room for another process."""
        with _idle_threads_sleep():
            self.process.start()
        self._far.close()  # so that the pipe ends when the child does
        self._writer.start()
        threading.Thread(target=self._read, name="headrace-engine-read", daemon=True).start()

    def send(self, message: Message) -> None:
        """Queue a message; never blocks."""
        self._outbox.put(message)

    def stop(self) -> None:
        """Ask the process to end and make sure that it does."""
        self.send(("close",))
        self.process.join(PATIENCE_S if self.loaded else 0.0)
        self._make_sure()

    def _make_sure(self) -> None:
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def _read(self) -> None:
        while True:
            try:
                message = self._connection.recv()
            except (EOFError, OSError):
                break
            self._receive(message)
        self.process.join(PATIENCE_S)
        self._make_sure()  # before another takes its place: it may hold memory and devices
        self._outbox.put(None)
        self._writer.join()
        self._connection.close()
        self._receive(("exit", self.process.exitcode))

    def _write(self) -> None:
        while (message := self._outbox.get()) is not None:
            try:
                self._connection.send(message)
            except OSError:  # the process is gone; the reading thread reports it
                return
            except Exception as error:  # whatever pickle raises concerns this message alone
                self._receive(("unsent", message, error))


@contextlib.contextmanager
def _idle_threads_sleep() -> Iterator[None]:
    """Meanwhile new processes inherit a setting by which OpenMP threads sleep while they wait, unless the user chose one.

    The engine shares its cores with the server's process. Threads that spin would keep them from it, and then wait for each other.
    """
    if {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & set(os.environ):
        yield
        return
    os.environ["OMP_WAIT_POLICY"] = "passive"
    try:
        yield
    finally:
        del os.environ["OMP_WAIT_POLICY"]
