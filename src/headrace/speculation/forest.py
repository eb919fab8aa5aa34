"""The candidate trees of a step side by side, as flat arrays, and the order in which their nodes may be taken.

A node's path probability is never above its parent's, so whoever takes nodes best first, equals by index, always holds a connected
tree: a request's choice is a number of nodes, nothing more.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from headrace.core.batch import Ints
from headrace.core.speculation import DraftTree, Floats

Counts = NDArray[np.int64]


class Forest:
    """Candidate trees of R requests.

    Attributes:
        sizes: int64[R], nodes of each tree.
        starts: int64[R + 1]; request i's nodes are ``starts[i]:starts[i + 1]``, in the order of its tree.
        owners: int64[N], request of each node, and of each place in ``order``.
        probabilities: float64[N], path probabilities.
        order: int64[N], nodes grouped by request, best first.
        gains: float64[N], ``probabilities[order]``.
    """

    def __init__(self, trees: Sequence[DraftTree | None]) -> None:
        self.sizes: Counts = np.array([0 if t is None else len(t) for t in trees], np.int64)
        self.starts: Counts = np.concatenate([[0], np.cumsum(self.sizes)])
        self.owners: Counts = np.repeat(np.arange(len(trees)), self.sizes)
        parts = [t.probabilities for t in trees if t is not None]
        self.probabilities: Floats = np.concatenate(parts) if parts else np.empty(0)
        # Stable sorts: equal nodes stay in the order of their tree, where parents come first.
        best = np.argsort(-self.probabilities, kind="stable")
        self.order: Counts = best[np.argsort(self.owners[best].astype(np.int16), kind="stable")]
        self.gains: Floats = self.probabilities[self.order]
        self._sums = np.concatenate([[0.0], np.cumsum(self.gains)])

    def __len__(self) -> int:
        return len(self.sizes)

    def expected(self, taken: Counts) -> Floats:
        """float64[R]: tokens each request may expect of its ``taken`` best nodes, the token of the root included."""
        return np.asarray(1.0 + self._sums[self.starts[:-1] + taken] - self._sums[self.starts[:-1]])

    def fewest(self, need: Floats) -> Counts:
        """int64[R]: the fewest nodes from which each request expects ``need`` tokens; one more than it has where all do not suffice.

        A trillionth is forgiven, so that sums in another order reach the same verdict.
        """
        base = self._sums[self.starts[:-1]]
        count = self._sums.searchsorted(base + need - 1.0 - 1e-12, side="left") - self.starts[:-1]
        return np.asarray(np.clip(count, 0, self.sizes + 1))

    def merged(self, taken: Counts, weights: Floats | None = None) -> Counts:
        """Places in ``order`` that are not taken yet, the best first.

        Args:
            taken: int64[R], how many of each request's best nodes are gone.
            weights: float64[R], what each request's nodes count for; 1 by default.
        """
        free = np.flatnonzero(np.arange(len(self.order)) >= (self.starts[:-1] + taken)[self.owners])
        worth = self.gains[free]
        if weights is not None:
            worth = worth * weights[self.owners[free]]
        return np.asarray(free[np.argsort(-worth, kind="stable")])

    def nodes(self, taken: Counts) -> list[Ints]:
        """For each request its ``taken`` best nodes by index in its tree, best first."""
        return [
            (self.order[start : start + count] - start).astype(np.int32)
            for start, count in zip(self.starts[:-1].tolist(), taken.tolist(), strict=True)
        ]
