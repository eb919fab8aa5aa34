"""Random operands, and how far a product is from the exact one."""

from __future__ import annotations

import torch
from torch import Tensor


def values(*shape: int, seed: int, exact_bfloat16: bool = False) -> Tensor:
    """float32 of a normal distribution; with ``exact_bfloat16`` such as bfloat16 holds without rounding."""
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return drawn.bfloat16().float() if exact_bfloat16 else drawn


def error(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> float:
    """Largest error of ``y`` = x @ weight.T + bias, in units of the magnitude a row's products add up to."""
    exact = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    scale = x.double().abs() @ weight.double().abs().T + (0 if bias is None else bias.double().abs())
    return float(((y - exact).abs() / scale.clamp_min(1e-30)).max())
