"""The arena: aligned, disjoint, outliving its owner, and rewound."""

from __future__ import annotations

import mmap

import pytest
import torch

from headrace.native.memory import HUGE, LINE, Arena


def test_pieces_are_aligned_and_apart() -> None:
    arena = Arena(1 << 20)
    pieces = [arena.take(size) for size in (1, 63, 64, 65, 100_000, 900_000, 3 << 20, 5)]
    for number, piece in enumerate(pieces):
        assert piece.data_ptr() % LINE == 0
        piece.fill_(number)
    assert all((piece == number).all() for number, piece in enumerate(pieces))


def test_chunks_start_on_huge_pages_and_are_filled_up() -> None:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        pytest.skip("this system has no huge pages to ask for")
    arena = Arena(4 * HUGE)
    first, second = arena.take(HUGE), arena.take(3 * HUGE)
    assert first.data_ptr() % HUGE == 0
    assert second.data_ptr() == first.data_ptr() + HUGE
    assert arena.take(1).data_ptr() != second.data_ptr() + 3 * HUGE


def test_memory_outlives_the_arena() -> None:
    arena = Arena()
    piece = arena.take(1000)
    piece.fill_(7)
    del arena
    torch.zeros(1 << 20)
    assert (piece == 7).all()


def test_rewind_takes_back() -> None:
    arena = Arena(1 << 20)
    arena.take(100)
    mark = arena.mark()
    lost = [arena.take(200).data_ptr(), arena.take(2 << 20).data_ptr()]
    arena.rewind(mark)
    assert arena.take(200).data_ptr() == lost[0]


def test_a_kernel_without_huge_pages_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    piece = Arena().take(10)
    piece.fill_(1)
    assert piece.sum() == 10
