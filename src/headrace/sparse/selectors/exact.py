"""The two ends: everything, and the best choice that exact scores allow."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.sparse.index import attended, best
from headrace.sparse.selectors.base import Selector


class Full(Selector):
    """Dense attention."""

    def share(self, count: int) -> int:
        return 1 << 62

    def select(self, queries: Tensor, keys: Tensor, first: int, last: int, count: int, scale: float) -> Tensor:
        return torch.arange(first, last, device=keys.device).expand(len(keys), -1)


class Oracle(Selector):
    """The tokens that receive most attention: what any retrieval of whole tokens can reach at best (sheet section 6)."""

    def select(self, queries: Tensor, keys: Tensor, first: int, last: int, count: int, scale: float) -> Tensor:
        scores = queries.float() @ keys[:, first:last].float().transpose(1, 2) * scale
        return best(attended(scores), count) + first
