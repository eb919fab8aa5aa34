"""The searchable sketch of one layer's middle keys: codes, scores from a table of products, and the best tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.sparse.codebook import Codebook, Codes, fit


class PQIndex:
    """Codes of the keys of R rows (sequences times KV heads), all of one length; the torch reference of every faster form.

    Args:
        codes: sub-spaces and bits.
        iterations: of Lloyd when the codebook is fitted.
        seed: of the draw that fitting starts from.

    Attributes:
        length: keys indexed.
        codebook: None before the first :meth:`build`.
        skip: int64[R], keys at the start of each row that are padding; None where there are none.
    """

    def __init__(self, codes: Codes, *, iterations: int = 8, seed: int = 0) -> None:
        self.codes, self.iterations, self.seed = codes, iterations, seed
        self.length = 0
        self.codebook: Codebook | None = None
        self._store: Tensor | None = None
        self.skip: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of codes in use and of centroids."""
        if self.codebook is None or self._store is None:
            return 0
        rows, subspaces, _ = self._store.shape
        return rows * subspaces * self.length * self._store.element_size() + self.codebook.nbytes

    @property
    def table(self) -> Tensor:
        """The codes [R, m, n]."""
        if self._store is None:
            raise ValueError("nothing is indexed yet: build first")
        return self._store[:, :, : self.length]

    def build(self, keys: Tensor, skip: Tensor | None = None) -> None:
        """Fit a codebook on ``keys`` [R, n, D] and code them; what was there is forgotten.

        Args:
            skip: int64[R], keys at the start of each row that are padding: neither clustered nor ever selected.
        """
        self.codebook = fit(keys, self.codes, iterations=self.iterations, skip=skip, seed=self.seed)
        self.skip = skip if skip is not None and bool((skip > 0).any()) else None
        self._store, self.length = None, 0
        self.append(keys)

    def append(self, keys: Tensor) -> None:
        """Code further ``keys`` [R, n, D] with the centroids there are."""
        if self.codebook is None:
            raise ValueError("nothing is indexed yet: build first")
        fresh = self.codebook.assign(keys)
        need = self.length + fresh.shape[2]
        if self._store is None or self._store.shape[2] < need:
            grown = fresh.new_zeros(*fresh.shape[:2], max(need, 2 * self.length, 64))
            if self._store is not None:
                grown[:, :, : self.length] = self.table
            self._store = grown
        self._store[:, :, self.length : need] = fresh
        self.length = need

    def truncate(self, length: int) -> None:
        """Forget all but the first ``length`` keys, as after a rejected draft."""
        if length < 0:
            raise ValueError(f"length is {length}: it cannot be below 0")
        self.length = min(self.length, length)

    def select_rows(self, rows: Tensor) -> None:
        """Keep the rows of these indices, in their order: a reordered or repeated batch."""
        if self.codebook is None or self._store is None:
            return
        self.codebook = Codebook(self.codebook.centroids.index_select(0, rows))
        self._store = self._store.index_select(0, rows)
        self.skip = None if self.skip is None else self.skip.index_select(0, rows)

    def scores(self, queries: Tensor, scale: float) -> Tensor:
        """Approximate scaled products of ``queries`` [R, G, D] with every key: float32[R, G, n]; -inf for padding."""
        if self.codebook is None:
            raise ValueError("nothing is indexed yet: build first")
        products = self.codebook.table(queries) * scale
        codes = self.table.long()
        rows, subspaces, count = codes.shape
        total = torch.zeros(rows, queries.shape[1], count, device=queries.device)
        for run in range(subspaces):
            total += products[:, :, run].gather(2, codes[:, run, None].expand(-1, queries.shape[1], -1))
        if self.skip is not None:
            padding = torch.arange(count, device=total.device)[None] < self.skip[:, None]
            total.masked_fill_(padding[:, None], -torch.inf)
        return total

    def select(self, queries: Tensor, k: int, scale: float) -> Tensor:
        """The ``k`` most attended keys of each row: int64[R, min(k, n)], best first, the newest of equals first.

        A softmax per query head comes before the sum over the group, lest one head with a large norm decide for all.
        """
        return best(attended(self.scores(queries, scale)), k)


def attended(scores: Tensor) -> Tensor:
    """Approximate attention that each key gets from its group: float32[R, G, n] scores to [R, n]; padding gets none."""
    return scores.softmax(-1).nan_to_num(0.0).sum(1)


def best(weights: Tensor, k: int) -> Tensor:
    """Indices of the ``k`` largest of ``weights`` [R, n] by value, then by index, both falling: int64[R, min(k, n)]."""
    count = weights.shape[1]
    order = weights.flip(1).argsort(dim=1, descending=True, stable=True)[:, :k]
    return count - 1 - order
