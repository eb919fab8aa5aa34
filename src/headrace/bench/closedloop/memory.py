"""How fast memory is just now: what decides a decode step, and what neighbours on the same machine take away."""

from __future__ import annotations

import time

SPIN_S = 0.02


class MemoryProbe:
    """Reads 256 MB on ``threads`` threads. Made once, because making the matrix takes longer than reading it."""

    def __init__(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._matrix, self._vector = torch.ones(8192, 8192), torch.ones(8192)

    def __call__(self) -> float:
        """GB/s, the best of three readings. Takes about 0.1 s."""
        import torch

        best = float("inf")
        for _ in range(3):
            started = time.perf_counter()
            torch.mv(self._matrix, self._vector)
            best = min(best, time.perf_counter() - started)
        time.sleep(SPIN_S)  # the pool's threads spin a while after their work
        return self._matrix.nbytes / best / 1e9
