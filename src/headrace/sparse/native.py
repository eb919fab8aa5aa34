"""An index held as sketches of the native kernels; it selects what its base class, the torch reference, selects."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.sparse.codebook import Codebook, Codes
from headrace.sparse.index import PQIndex
from headrace.sparse.sketch import Book, Question, Rows, Searcher, Sketch


class NativeIndex(PQIndex):
    """Rows of one sequence share a sketch.

    Args:
        heads: rows that belong to one sequence; 1 where they have nothing to do with each other.
    """

    def __init__(self, codes: Codes, *, iterations: int = 8, seed: int = 0, heads: int = 1) -> None:
        super().__init__(codes, iterations=iterations, seed=seed)
        self.heads = heads
        self.sketches: list[Sketch] = []
        self._searcher = Searcher()
        self._padding: Tensor | None = None

    def build(self, keys: Tensor, skip: Tensor | None = None) -> None:
        """As the reference; ``skip`` may leave a row without any key to choose."""
        self._padding = skip
        super().build(keys, None if skip is None else skip.clamp(max=keys.shape[1] - 1))

    @property
    def nbytes(self) -> int:
        return sum(sketch.nbytes + sketch.book.nbytes for sketch in self.sketches)

    @property
    def table(self) -> Tensor:
        if not self.sketches:
            raise ValueError("nothing is indexed yet: build first")
        return torch.cat([sketch.table for sketch in self.sketches])

    def append(self, keys: Tensor) -> None:
        if self.codebook is None:
            raise ValueError("nothing is indexed yet: build first")
        if self._store is None:  # told by the base class to begin anew
            self._start(self.codebook)
        for sketch, part in zip(self.sketches, torch.split(keys, self.heads), strict=True):
            sketch.append(part)
        self.length += keys.shape[1]

    def _start(self, codebook: Codebook) -> None:
        self._store = torch.empty(0)
        parts = torch.split(codebook.centroids, self.heads)
        skips = [0] * len(parts) if self._padding is None else self._padding[:: self.heads].tolist()
        self.sketches = [
            Sketch(self.codes, Book(Codebook(part)), skip) for part, skip in zip(parts, skips, strict=True)
        ]

    def truncate(self, length: int) -> None:
        super().truncate(length)
        for sketch in self.sketches:
            sketch.truncate(length)

    def select_rows(self, rows: Tensor) -> None:
        if self.codebook is None:
            return
        table = self.table.index_select(0, rows)
        self.codebook = Codebook(self.codebook.centroids.index_select(0, rows))
        self.skip = None if self.skip is None else self.skip.index_select(0, rows)
        self._padding = None if self._padding is None else self._padding.index_select(0, rows)
        self._start(self.codebook)
        for sketch, part in zip(self.sketches, torch.split(table, self.heads), strict=True):
            sketch.put(part)

    def select(self, queries: Tensor, k: int, scale: float) -> Tensor:
        """As the reference, but in no particular order."""
        if self.codebook is None:
            raise ValueError("nothing is indexed yet: build first")
        rows, group, size = queries.shape
        most = min(k, self.length)
        chosen = torch.arange(most).expand(rows, -1).clone()  # padding, where there is nothing else left
        nothing = torch.empty(0)
        for number, sketch in enumerate(self.sketches):
            first = number * self.heads
            asked = queries[first : first + self.heads].float().reshape(1, self.heads * group, size).contiguous()
            rows_of = Rows(nothing, nothing, 0, 0, self.heads, size)
            found = self._searcher.select(Question(sketch, rows_of, asked, 0, 0, 0, most, most, scale))
            for head, items in enumerate(found):
                rest = most - len(items)
                chosen[first + head, rest:] = items.long()
        return chosen

    def resynchronise(self) -> None:
        """Take note of what a :class:`Searcher` has coded."""
        self.length = self.sketches[0].length
