"""What every way of choosing tokens has in common, so that they differ in nothing but the choice.

Shapes throughout: R rows (sequences times KV heads) of G query heads each, L tokens of context, D dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Place:
    """Which layer of how many a selector works for: some spend more on the first ones."""

    layer: int = 0
    layers: int = 1


class Selector:
    """Chooses, at every decode step of one layer, which tokens of the middle are attended to.

    The initial tokens, the local window and the newest token are attended whatever it says, and it is told how many more to
    name, so that all selectors read the same number of tokens. It belongs to one context from its beginning.

    Attributes:
        drops: whether a token that it passed over once can never come back, as where its K and V were thrown away.
        watches: whether it wants to be told what the chosen tokens received (:meth:`observe`).
    """

    drops: ClassVar[bool] = False
    watches: ClassVar[bool] = False

    def __init__(self, place: Place | None = None) -> None:
        self.place = place or Place()

    def read(self, queries: Tensor, keys: Tensor, scale: float) -> None:
        """See the newest n tokens attend exactly to all of the context, as prompts do.

        Args:
            queries: [R, G, n, D].
            keys: [R, L, D], of all tokens, the n newest included.
            scale: factor on scores.
        """

    def share(self, count: int) -> int:
        """How many tokens this layer takes when ``count`` are due on average."""
        return count

    def select(self, queries: Tensor, keys: Tensor, first: int, last: int, count: int, scale: float) -> Tensor:
        """The ``count`` tokens to attend to among those from ``first`` up to ``last`` - 1: int64[R, count], distinct, in any order.

        Args:
            queries: [R, G, D], of the newest token.
            keys: [R, L, D], the newest token's included.
            count: at most ``last - first``.
        """
        raise NotImplementedError

    def observe(self, index: Tensor, weights: Tensor) -> None:
        """Hear that the tokens ``index`` [R, k] received ``weights`` [R, G, k] of attention in this step."""


def newest(rows: int, last: int, count: int, device: torch.device) -> Tensor:
    """The ``count`` tokens before ``last``, for every row: int64[R, count]."""
    return torch.arange(last - count, last, device=device).expand(rows, -1)


def take_blocks(order: Tensor, block: int, size: int, count: int) -> Tensor:
    """``count`` tokens, whole blocks as ``order`` [R, blocks] has them, of the last one only the newest part.

    Args:
        block: tokens of a block; the last block of ``size`` tokens may be shorter.

    Returns:
        int64[R, count], from 0 up to ``size`` - 1.
    """
    # Within a block the newest token goes first, so that cutting keeps it.
    inside = torch.arange(block - 1, -1, -1, device=order.device)
    tokens = (order[:, :, None] * block + inside).flatten(1)
    real = tokens < size
    # A stable sort of "is no token" keeps the order of the real ones.
    front = (~real).to(torch.uint8).argsort(dim=1, stable=True)[:, :count]
    return tokens.gather(1, front)


__all__ = ["Place", "Selector", "newest", "take_blocks"]
