"""Which slots have valid codes, and by which codebooks: how sequences share an index through the prefixes they share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from headrace.models.cache.slots import Ints, SlotPool
from headrace.sparse.codebook import Codes

if TYPE_CHECKING:
    from headrace.sparse.sketch import Book

NOBODY = 0


@dataclass(slots=True)
class Edition:
    """Codebooks of all layers, fitted together.

    Attributes:
        number: in the shelf's register, above 0.
        books: one a layer.
        fitted: items that they were fitted on.
    """

    number: int
    books: list[Book]
    fitted: int


class Shelf:
    """Codes as a plane of the slot pool, ``pq.{layer}`` uint8[slots, Hkv, m], and the editions that they belong to.

    A slot's codes are by one edition; whoever finds slots through the prefix cache finds their codes with them. An edition lives as
    long as a slot has codes by it.

    Args:
        pool: where K and V live.
        depth, heads: layers, and K/V heads.
        codes: sub-spaces and bits, at most 8.
    """

    def __init__(self, pool: SlotPool, depth: int, heads: int, codes: Codes) -> None:
        shape = (heads, codes.subspaces)
        self.planes: list[Tensor] = [
            pool.add_plane(f"pq.{layer}", shape, torch.uint8, "cpu", *((self._freed, self._moved) if not layer else ()))
            for layer in range(depth)
        ]
        self._edition_of = np.zeros(pool.size, np.int32)
        self._editions: dict[int, Edition] = {}
        self._next = 1

    def __len__(self) -> int:
        """Editions that slots have codes by."""
        return len(self._editions)

    def publish(self, books: list[Book], fitted: int) -> Edition:
        """A new edition; it is forgotten unless :meth:`write` uses it."""
        edition = Edition(self._next, books, fitted)
        self._next += 1
        return edition

    def find(self, slots: Ints) -> tuple[Edition | None, int]:
        """The edition by which the first of ``slots`` have codes, and how many do."""
        numbers = self._edition_of[slots]
        if not len(numbers) or numbers[0] == NOBODY:
            return None, 0
        other = np.flatnonzero(numbers != numbers[0])
        return self._editions[int(numbers[0])], int(other[0]) if len(other) else len(numbers)

    def read(self, layer: int, slots: Ints) -> Tensor:
        """Codes of ``slots`` in a layer: uint8[Hkv, m, n]."""
        return self.planes[layer][torch.from_numpy(slots).long()].permute(1, 2, 0)

    def write(self, edition: Edition, slots: Ints, codes: list[Tensor]) -> None:
        """Keep ``codes`` uint8[Hkv, m, n] of every layer for ``slots``, in place of what there was."""
        at = torch.from_numpy(slots).long()
        for plane, part in zip(self.planes, codes, strict=True):
            plane[at] = part.permute(2, 0, 1)
        self._editions[edition.number] = edition
        self._edition_of[slots] = edition.number
        self._drop()

    def _freed(self, slots: Ints) -> None:
        if self._editions and self._edition_of[slots].any():
            self._edition_of[slots] = NOBODY
            self._drop()

    def _moved(self, old: Ints, new: Ints) -> None:
        self._edition_of[new] = self._edition_of[old]
        self._drop()

    def _drop(self) -> None:
        """Forget editions that no slot has codes by."""
        if len(self._editions) > 1 or not self._edition_of.any():
            used = set(np.unique(self._edition_of).tolist())
            for number in [number for number in self._editions if number not in used]:
                del self._editions[number]
