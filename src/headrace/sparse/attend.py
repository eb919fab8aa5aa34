"""Exact attention over chosen rows of K and V, and what an estimate of the rest can mend."""

from __future__ import annotations

import torch
from torch import Tensor


def attend_rows(
    queries: Tensor, keys: Tensor, values: Tensor, index: Tensor, valid: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of one token over rows of its context.

    Args:
        queries: [R, G, D], R rows (sequences times KV heads) of G query heads each.
        keys, values: [R, L, D].
        index: int64[R, k], the rows to attend to; no valid one twice.
        valid: bool[R, k], False for rows that do not count; all do by default.
        scale: factor on the scores.

    Returns:
        float32 outputs [R, G, D] and, per query head, the logarithm of the sum of the exponentials of its scores [R, G].
    """
    wide = index[..., None].expand(-1, -1, keys.shape[-1])
    chosen, carried = keys.gather(1, wide).float(), values.gather(1, wide).float()
    scores = queries.float() @ chosen.transpose(1, 2) * scale
    if valid is not None:
        scores = scores.masked_fill(~valid[:, None], -torch.inf)
    total = scores.logsumexp(-1)
    return (scores - total[..., None]).exp() @ carried, total


def add_rest(output: Tensor, total: Tensor, rest: Tensor, mean: Tensor) -> Tensor:
    """Give the tokens that were not read the weight they are estimated to have, and the mean value.

    Top-k attention renormalises over what it read, which exaggerates it where attention is spread out. The sketch's scores
    tell for nothing how much was left out.

    Args:
        output, total: of :func:`attend_rows`.
        rest: [R, G], logarithm of the estimated sum over the tokens left out; -inf for none.
        mean: float32[R, D], the mean of the values left out.
    """
    share = torch.sigmoid(total - rest)[..., None]
    return share * output + (1.0 - share) * mean[:, None]


def missing(total: Tensor, rest: Tensor) -> Tensor:
    """Estimated share of attention that goes to tokens left out, per query head: [R, G]."""
    return torch.sigmoid(rest - total)
