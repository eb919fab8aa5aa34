"""The likeliest next tokens of rows of logits."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from headrace.core.batch import Ints
from headrace.core.speculation import Floats


def likeliest(logits: Tensor, count: int) -> tuple[Ints, Floats]:
    """The ``count`` best tokens of each row, best first.

    Args:
        logits: float[R, V] on any device.

    Returns:
        int32[R, count] ids and float64[R, count] log-probabilities.
    """
    values = logits.to(torch.float32)
    best, ids = values.topk(min(count, values.shape[-1]), dim=-1)
    logs = best - values.logsumexp(dim=-1, keepdim=True)
    return ids.cpu().numpy().astype(np.int32), logs.cpu().numpy().astype(np.float64)
