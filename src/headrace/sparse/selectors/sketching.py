"""Selectors that keep everything and read a small sketch of the keys to find what matters now: SparQ, Quest, InfLLM, PQ."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.sparse.codebook import Codes
from headrace.sparse.index import PQIndex, attended, best
from headrace.sparse.search import compiled_kind
from headrace.sparse.selectors.base import Place, Selector, take_blocks


class SparQ(Selector):
    """Scores from the few dimensions in which the query is largest (arXiv 2312.04985): reads 2 bytes times ``dimensions`` a token."""

    def __init__(self, place: Place | None = None, dimensions: int = 16) -> None:
        super().__init__(place)
        self.dimensions = dimensions

    def select(self, queries: Tensor, keys: Tensor, first: int, last: int, count: int, scale: float) -> Tensor:
        queries = queries.float()
        sizes = queries.abs()
        chosen = sizes.sum(1).topk(min(self.dimensions, queries.shape[-1]), 1).indices
        short = queries.gather(2, chosen[:, None].expand(-1, queries.shape[1], -1))
        columns = keys[:, first:last].gather(2, chosen[:, None].expand(-1, last - first, -1)).float()
        # Fewer dimensions make smaller products: the softmax is cooled by the share of the query that they hold.
        share = short.abs().sum(-1, keepdim=True) / sizes.sum(-1, keepdim=True).clamp(min=1e-30)
        scores = short @ columns.transpose(1, 2) * (scale / share.sqrt().clamp(min=1e-30))
        return best(attended(scores), count) + first


class Quest(Selector):
    """Pages whose elementwise bounds allow the largest product (arXiv 2406.10774); the remainder of the budget goes to part of a page.

    The original reads its first two layers in full. That would be another number of tokens, so it is not done here. Groups of
    query heads are summed after a softmax over pages, as the tokens of :class:`Oracle` are.
    """

    def __init__(self, place: Place | None = None, page: int = 16) -> None:
        super().__init__(place)
        self.page = page
        self.first = 0
        self._bounds: tuple[Tensor, Tensor] | None = None  # of whole pages, [R, pages, D] each: least, greatest

    def select(self, queries: Tensor, keys: Tensor, first: int, last: int, count: int, scale: float) -> Tensor:
        least, greatest = self._pages(keys[:, first:last], first)
        queries = queries.float()
        bound = queries.clamp(min=0) @ greatest.transpose(1, 2) + queries.clamp(max=0) @ least.transpose(1, 2)
        needed = min(bound.shape[2], -(-count // self.page) + 1)
        order = best(attended(bound * scale), needed)
        return take_blocks(order, self.page, last - first, count) + first

    def _pages(self, middle: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Bounds of all pages of the middle; those of whole pages are computed once."""
        whole = middle.shape[1] // self.page
        if self._bounds is None or self.first != first or self._bounds[0].shape[1] > whole:
            self._bounds, self.first = (middle[:, :0].float(), middle[:, :0].float()), first
        known = self._bounds[0].shape[1]
        if whole > known:
            fresh = (
                middle[:, known * self.page : whole * self.page]
                .float()
                .view(len(middle), -1, self.page, middle.shape[2])
            )
            self._bounds = (
                torch.cat([self._bounds[0], fresh.amin(2)], 1),
                torch.cat([self._bounds[1], fresh.amax(2)], 1),
            )
        rest = middle[:, whole * self.page :].float()
        if rest.shape[1] == 0:
            return self._bounds
        least, greatest = self._bounds
        return (
            torch.cat([least, rest.amin(1, keepdim=True)], 1),
            torch.cat([greatest, rest.amax(1, keepdim=True)], 1),
        )


class InfLLM(Selector):
    """Blocks by the keys of a few tokens each (arXiv 2402.04617): those that the ``window`` tokens after them asked for most.

    A block's score is the query's product with the sum of its representatives, averaged over the group.
    """

    def __init__(
        self, place: Place | None = None, block: int = 128, representatives: int = 4, window: int = 128
    ) -> None:
        super().__init__(place)
        self.block, self.representatives, self.window = block, representatives, window
        self._asked: Tensor | None = None  # running sums of queries, over the group too, float64[R, tokens, D]
        self.first = 0
        self._sums: Tensor | None = None  # of whole blocks' representatives, [R, blocks, D]

    def read(self, queries: Tensor, keys: Tensor, scale: float) -> None:
        self._ask(queries.double().sum(1))

    def select(self, queries: Tensor, keys: Tensor, first: int, last: int, count: int, scale: float) -> Tensor:
        self._ask(queries.double().sum(1, keepdim=True))
        sums = self._blocks(keys[:, first:last], first)
        scores = (queries.float() @ sums.transpose(1, 2)).mean(1)
        needed = min(scores.shape[1], -(-count // self.block) + 1)
        return take_blocks(best(scores, needed), self.block, last - first, count) + first

    def _ask(self, queries: Tensor) -> None:
        if self._asked is None:
            self._asked = queries.cumsum(1)
        else:
            self._asked = torch.cat([self._asked, self._asked[:, -1:] + queries.cumsum(1)], 1)

    def _blocks(self, middle: Tensor, first: int) -> Tensor:
        """Sums of representatives of all blocks of the middle; those of whole blocks are computed once."""
        whole = middle.shape[1] // self.block
        if self._sums is None or self.first != first or self._sums.shape[1] > whole:
            self._sums, self.first = middle[:, :0].float(), first
        for number in range(self._sums.shape[1], whole):
            self._sums = torch.cat([self._sums, self._represent(middle, first, number)], 1)
        if middle.shape[1] == whole * self.block:
            return self._sums
        return torch.cat([self._sums, self._represent(middle, first, whole)], 1)

    def _represent(self, middle: Tensor, first: int, number: int) -> Tensor:
        assert self._asked is not None
        keys = middle[:, number * self.block : (number + 1) * self.block].float()
        begin = first + number * self.block
        end = begin + keys.shape[1]
        ahead = torch.arange(begin, end, device=keys.device)
        until = (ahead + self.window).clamp(max=self._asked.shape[1] - 1)
        asked = (self._asked[:, until] - self._asked[:, begin:end]).float() / (until - ahead).clamp(min=1)[:, None]
        chosen = (asked * keys).sum(-1).topk(min(self.representatives, keys.shape[1]), 1).indices
        return keys.gather(1, chosen[..., None].expand(-1, -1, keys.shape[2])).sum(1, keepdim=True)


class ProductQuantised(Selector):
    """Scores from product-quantised keys (arXiv 2407.12820): the index of :class:`headrace.sparse.PQCache`, on its own.

    Args:
        codes: as in "2x6".
        refresh: fit anew once the middle has grown by this share; None never does.
    """

    def __init__(
        self,
        place: Place | None = None,
        codes: str = "2x6",
        refresh: float | None = 1.0,
        iterations: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__(place)
        self.codes, self.refresh, self.iterations, self.seed = Codes.parse(codes), refresh, iterations, seed
        self.index: PQIndex | None = None
        self._fitted = self.first = 0

    def select(self, queries: Tensor, keys: Tensor, first: int, last: int, count: int, scale: float) -> Tensor:
        size = last - first
        stale = self.index is not None and self.refresh is not None and size > self._fitted * (1.0 + self.refresh)
        if self.index is None or stale or self.first != first or size < self.index.length:
            kind = compiled_kind(self.codes, keys.device)
            self.index = kind(self.codes, iterations=self.iterations, seed=self.seed)
            self.index.build(keys[:, first:last])
            self._fitted, self.first = size, first
        elif size > self.index.length:
            self.index.append(keys[:, first + self.index.length : last])
        return self.index.select(queries, count, scale) + first
