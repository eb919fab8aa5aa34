"""Room for weights on huge pages.

A decode step streams all weights. On pages of 4 KiB the processor stops at every page to translate its address, which costs a
third of the memory's bandwidth; on pages of 2 MiB it hardly does. Matrices are packed one behind the other into large chunks, so
that they fill those pages but for the last.
"""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

HUGE = 2 << 20
LINE = 64
CHUNK = 64 << 20


class Arena:
    """Hands out memory that lives as long as any tensor made of it.

    Args:
        chunk: bytes asked of the system at a time; what is not handed out takes no memory.
    """

    def __init__(self, chunk: int = CHUNK) -> None:
        self._size = chunk
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def take(self, nbytes: int) -> Tensor:
        """uint8[nbytes], at the start of a cache line, with undefined values."""
        start = -(-self._used // LINE) * LINE
        if start + nbytes > len(self._chunk):
            self._chunk, start = _reserve(max(nbytes, self._size)), 0
        self._used = start + nbytes
        return self._chunk[start : self._used]

    def mark(self) -> tuple[Tensor, int]:
        """Where the arena stands, for :meth:`rewind`."""
        return self._chunk, self._used

    def rewind(self, mark: tuple[Tensor, int]) -> None:
        """Take back everything handed out since ``mark``, which must not be used any more."""
        self._chunk, self._used = mark


def _reserve(nbytes: int) -> Tensor:
    """uint8[at least nbytes] from a multiple of HUGE on."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(nbytes, dtype=torch.uint8)
    whole = -(-nbytes // HUGE) * HUGE
    area = mmap.mmap(-1, whole + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory = torch.frombuffer(area, dtype=torch.uint8)
    start = -memory.data_ptr() % HUGE
    with contextlib.suppress(OSError):  # a kernel without huge pages is slower, no less right
        area.madvise(mmap.MADV_HUGEPAGE, start, whole)
    return memory[start : start + whole]
