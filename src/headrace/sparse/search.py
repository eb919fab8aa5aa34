"""An index searched on the CPU by compiled kernels; it selects what its base class, the torch reference, selects."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headrace.sparse.codebook import Codes
from headrace.sparse.index import PQIndex

CELL_BITS = 14
"""Codes of up to this many bits are searched by joint cells, longer ones by a scan."""

TAIL = 256
"""Appended keys that wait before they are sorted in."""

Ints = NDArray[np.int32]


def compiled_kind(codes: Codes, device: torch.device) -> type[PQIndex]:
    """The fastest index for ``device``: native where there is a compiler, by numba where that is installed, the reference elsewhere."""
    from headrace.sparse import sketch

    if sketch.usable(codes, torch.float32, device):
        from headrace.sparse.native import NativeIndex

        return NativeIndex
    if device.type != "cpu" or importlib.util.find_spec("numba") is None:
        return PQIndex
    return CellIndex if codes.bits * codes.subspaces <= CELL_BITS else ScanIndex


class _Compiled(PQIndex):
    """What both compiled searches share: scratch memory, and rows one after the other."""

    def __init__(self, codes: Codes, *, iterations: int = 8, seed: int = 0) -> None:
        super().__init__(codes, iterations=iterations, seed=seed)
        self._room: dict[str, NDArray[Any]] = {}

    def select(self, queries: Tensor, k: int, scale: float) -> Tensor:
        """As the reference, but in no particular order."""
        from headrace.sparse import kernels

        if self.codebook is None:
            raise ValueError("nothing is indexed yet: build first")
        tables = (self.codebook.table(queries) * scale).numpy()
        chosen = np.empty((len(tables), min(k, self.length)), np.int32)
        sums = np.empty(tables.shape[1], np.float32)
        bins = self._hold("bins", kernels.BINS, np.int64)
        for row, table in enumerate(tables):
            self._search(kernels, row, table, bins, chosen[row], sums)
        return torch.from_numpy(chosen).long()

    def _search(self, kernels: Any, row: int, table: Any, bins: Any, chosen: Any, sums: Any) -> None:
        """Fill ``chosen`` with the best keys of one row."""
        raise NotImplementedError

    def _hold(self, name: str, size: int, dtype: Any) -> NDArray[Any]:
        """Scratch of a size; its contents are of no use."""
        if name not in self._room or len(self._room[name]) < size:
            self._room[name] = np.empty(size, dtype)
        return self._room[name][:size]


class ScanIndex(_Compiled):
    """Every key's score is summed up."""

    def _search(self, kernels: Any, row: int, table: Any, bins: Any, chosen: Any, sums: Any) -> None:
        scores, weights = (self._hold(name, self.length, np.float32) for name in ("scores", "weights"))
        ones = self._hold("ones", self.length, np.int32)
        ones[:] = 1
        codes = self.table[row].numpy()
        first = 0 if self.skip is None else int(self.skip[row])
        found = kernels.search_tokens(table, codes, first, ones, len(chosen), scores, weights, bins, chosen, sums)
        chosen[found:] = np.arange(len(chosen) - found)  # padding, where there is nothing else left


class CellIndex(_Compiled):
    """Keys lie sorted by their joint code, so that the cost of a search does not depend on their number."""

    def __init__(self, codes: Codes, *, iterations: int = 8, seed: int = 0) -> None:
        super().__init__(codes, iterations=iterations, seed=seed)
        self._forget()

    def _forget(self) -> None:
        self._sorted = self._known = 0
        self._cells = self._order = np.empty((0, 0), np.int32)
        self._starts = np.empty((0, 0), np.int32)

    def build(self, keys: Tensor, skip: Tensor | None = None) -> None:
        self._forget()
        super().build(keys, skip)

    def truncate(self, length: int) -> None:
        super().truncate(length)
        self._known = min(self._known, self.length)
        if self._sorted > self.length:
            self._sorted = 0

    def select_rows(self, rows: Tensor) -> None:
        super().select_rows(rows)
        self._forget()

    def select(self, queries: Tensor, k: int, scale: float) -> Tensor:
        self._catch_up()
        return super().select(queries, k, scale)

    def _search(self, kernels: Any, row: int, table: Any, bins: Any, chosen: Any, sums: Any) -> None:
        size = self.codes.cells
        scores, weights = (self._hold(name, size, np.float32) for name in ("scores", "weights"))
        tail, starts = self._cells[row, self._sorted : self.length], self._starts[row]
        counts = np.diff(starts)
        np.add.at(counts, tail[max(0, self._first(row) - self._sorted) :], 1)
        found = kernels.search_cells(
            table,
            starts,
            self._order[row],
            tail,
            self._sorted,
            counts,
            len(chosen),
            scores,
            weights,
            bins,
            chosen,
            sums,
        )
        chosen[found:] = np.arange(len(chosen) - found)  # padding, where there is nothing else left

    def _first(self, row: int) -> int:
        return 0 if self.skip is None else int(self.skip[row])

    def _catch_up(self) -> None:
        """Find the cells of new keys, and sort them in once there are enough of them."""
        from headrace.sparse import kernels

        codes, bits = self.table.numpy(), self.codes.bits
        rows, length = len(codes), self.length
        if self._cells.shape[0] != rows or self._cells.shape[1] < length:
            grown = np.empty((rows, max(length, length + length // 2)), np.int32)
            if self._known:
                grown[:, : self._known] = self._cells[:, : self._known]
            self._cells = grown
        for row in range(rows):
            kernels.join_codes(codes[row, :, self._known :], bits, self._cells[row, self._known : length])
        self._known = length
        skipped = 0 if self.skip is None else int(self.skip.max())
        if self._sorted == 0 or length - self._sorted > TAIL or self._sorted < skipped:
            self._order = np.empty((rows, length), np.int32)
            self._starts = np.empty((rows, self.codes.cells + 1), np.int32)
            for row in range(rows):
                kernels.sort_cells(self._cells[row, :length], self._first(row), self._starts[row], self._order[row])
            self._sorted = length
