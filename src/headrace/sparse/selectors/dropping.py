"""Selectors that decide early and throw away the rest: StreamingLLM, H2O, SnapKV, PyramidKV."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from headrace.sparse.selectors.base import Place, Selector, newest

BLOCK = 256
"""Queries whose attention weights are held at once."""


class StreamingLLM(Selector):
    """Initial and newest tokens only (arXiv 2309.17453): what is due from the middle lengthens the local window."""

    drops: ClassVar[bool] = True

    def select(self, queries: Tensor, keys: Tensor, first: int, last: int, count: int, scale: float) -> Tensor:
        return newest(len(keys), last, count, keys.device)


class H2O(Selector):
    """Heavy hitters (arXiv 2306.14048): tokens rank by all the attention that they have received so far, and the lowest go for good."""

    drops: ClassVar[bool] = True
    watches: ClassVar[bool] = True

    def __init__(self, place: Place | None = None) -> None:
        super().__init__(place)
        self._received: Tensor | None = None  # float32[R, tokens]
        self._gone: Tensor | None = None  # bool[R, tokens]

    def read(self, queries: Tensor, keys: Tensor, scale: float) -> None:
        count, length = queries.shape[2], keys.shape[1]
        self._grow(len(keys), length, keys.device)
        assert self._received is not None
        for start in range(0, count, BLOCK):
            part = queries[:, :, start : start + BLOCK].float()
            seen = length - count + start + part.shape[2]
            weights = _causal(part, keys[:, :seen].float(), scale)
            self._received[:, :seen] += weights.sum((1, 2))

    def select(self, queries: Tensor, keys: Tensor, first: int, last: int, count: int, scale: float) -> Tensor:
        self._grow(len(keys), keys.shape[1], keys.device)
        assert self._received is not None
        assert self._gone is not None
        middle = self._received[:, first:last].masked_fill(self._gone[:, first:last], -torch.inf)
        chosen = middle.topk(count, 1).indices
        self._gone[:, first:last] = True
        self._gone[:, first:last].scatter_(1, chosen, False)
        return chosen + first

    def observe(self, index: Tensor, weights: Tensor) -> None:
        assert self._received is not None
        self._received.scatter_add_(1, index, weights.sum(1))

    def _grow(self, rows: int, length: int, device: torch.device) -> None:
        if self._received is None or self._gone is None:
            self._received = torch.zeros(rows, length, device=device)
            self._gone = torch.zeros(rows, length, dtype=torch.bool, device=device)
        short = length - self._received.shape[1]
        if short > 0:
            self._received = torch.nn.functional.pad(self._received, (0, short))
            self._gone = torch.nn.functional.pad(self._gone, (0, short))


class SnapKV(Selector):
    """What the last tokens of the prompt attended to (arXiv 2404.14469), smoothed along the text, stays; the rest goes for good.

    When more is due as the answer grows, the newest tokens of the middle are kept besides.
    """

    drops: ClassVar[bool] = True

    def __init__(self, place: Place | None = None, window: int = 32, kernel: int = 5) -> None:
        super().__init__(place)
        self.window, self.kernel = window, kernel
        self._last: Tensor | None = None  # queries [R, G, <= window, D]
        self._kept: Tensor | None = None

    def read(self, queries: Tensor, keys: Tensor, scale: float) -> None:
        both = queries if self._last is None else torch.cat([self._last, queries], 2)
        # A copy, lest a window keep a prompt's queries alive.
        self._last, self._kept = both[:, :, -self.window :].clone(), None

    def select(self, queries: Tensor, keys: Tensor, first: int, last: int, count: int, scale: float) -> Tensor:
        if self._kept is None:
            prompt = keys[:, :-1].float()
            ranks = self._rank(prompt, scale)[:, first:last]
            self._kept = ranks.topk(min(count, ranks.shape[1]), 1).indices + first
        kept = self._kept[:, :count]
        if kept.shape[1] == count:
            return kept
        # The newest that are not kept already: those sort behind every other, whatever their age.
        tokens = torch.arange(first, last, device=keys.device).expand(len(keys), -1)
        ages = tokens.scatter(1, kept - first, -1)
        fresh = ages.topk(count - kept.shape[1], 1).values
        return torch.cat([kept, fresh], 1)

    def _rank(self, prompt: Tensor, scale: float) -> Tensor:
        """How much the window attends to each token: float32[R, L]."""
        assert self._last is not None
        weights = _causal(self._last.float(), prompt, scale)
        pooled = torch.nn.functional.avg_pool1d(weights.mean(2), self.kernel, stride=1, padding=self.kernel // 2)
        return pooled.mean(1)


class PyramidKV(SnapKV):
    """SnapKV with more tokens in the first layers than in the last (arXiv 2406.02069): linear, with the same mean.

    ``steepness`` is the first layer's share over the last one's.
    """

    def __init__(self, place: Place | None = None, window: int = 32, kernel: int = 5, steepness: float = 20.0) -> None:
        super().__init__(place, window, kernel)
        self.steepness = steepness

    def share(self, count: int) -> int:
        if self.place.layers == 1:
            return count
        high, low = 2.0 * self.steepness / (1.0 + self.steepness), 2.0 / (1.0 + self.steepness)
        return round(count * (high - (high - low) * self.place.layer / (self.place.layers - 1)))


def _causal(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Attention weights of the newest n tokens [R, G, n, D] over ``keys`` [R, L, D]: float32[R, G, n, L]."""
    count, length = queries.shape[2], keys.shape[1]
    scores = queries @ keys[:, None].transpose(2, 3) * scale
    hidden = torch.ones(count, length, dtype=torch.bool, device=keys.device).triu(length - count + 1)
    return scores.masked_fill_(hidden, -torch.inf).softmax(-1)
