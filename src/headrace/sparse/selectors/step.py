"""One layer's decode steps with any selector: the regions, the budget and the exact attention over what was chosen."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from headrace.sparse.regions import Regions
from headrace.sparse.selectors.base import Selector


class Step(NamedTuple):
    """What a step gave: float32 outputs [R, G, D], the tokens attended to int64[R, n], and what each received, float32[R, G, n]."""

    output: Tensor
    tokens: Tensor
    weights: Tensor


class SelectedAttention:
    """Attention of one layer over the tokens of a context that its selector names.

    Args:
        selector: used for this context alone.
        regions: the budget, and which tokens are attended to anyway; the same as :class:`headrace.sparse.PQCache` has.
    """

    def __init__(self, selector: Selector, regions: Regions) -> None:
        self.selector, self.regions = selector, regions
        self.prompt: int | None = None

    def read(self, queries: Tensor, keys: Tensor, scale: float) -> None:
        """Tell the selector of tokens that attended exactly: see :meth:`Selector.read`."""
        self.selector.read(queries, keys, scale)

    def choose(self, queries: Tensor, keys: Tensor, scale: float) -> Tensor:
        """The tokens that the newest one attends to, itself included and last: int64[R, n]."""
        length = keys.shape[1]
        if self.prompt is None:
            self.prompt = length - 1
        window = self.regions.window(self.prompt, length)
        first, last = window.middle(length)
        count = min(self.selector.share(window.retrieved), last - first)
        everything = torch.arange(length, device=keys.device).expand(len(keys), -1)
        found = self.selector.select(queries, keys, first, last, count, scale) if count else everything[:, :0]
        return torch.cat([everything[:, :first], found, everything[:, last:]], 1)

    def step(self, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Step:
        """Attention of the newest token: ``queries`` [R, G, D] over ``keys`` and ``values`` [R, L, D]."""
        index = self.choose(queries, keys, scale)
        wide = index[..., None].expand(-1, -1, keys.shape[-1])
        weights = (queries.float() @ keys.gather(1, wide).float().transpose(1, 2) * scale).softmax(-1)
        if self.selector.watches:
            self.selector.observe(index, weights)
        return Step(weights @ values.gather(1, wide).float(), index, weights)
