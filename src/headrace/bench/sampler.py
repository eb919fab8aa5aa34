"""Something that is looked at again and again while something else runs."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Sampler:
    """Calls ``take`` every ``seconds`` in a thread of its own, within the block; the last call has ended when the block has."""

    def __init__(self, take: Callable[[], object], seconds: float) -> None:
        self._take, self._seconds = take, seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._seconds):
            self._take()
