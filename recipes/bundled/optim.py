"""Muon for the hidden matrices, AdamW for the embedding and the norms, and the schedule of both.

Muon (Jordan et al., 2024, "Muon: an optimizer for hidden layers in neural networks") replaces a matrix's momentum by
its nearest semi-orthogonal matrix, found by a few Newton-Schulz steps. Matrices of equal shape are processed as
one stack.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


@dataclass(frozen=True)
class OptimConfig:
    """Rates and the shape of the schedule; `decay_begin` and `final_rate` are fractions."""

    muon_rate: float
    adam_rate: float
    warmup_steps: int
    decay_begin: float
    final_rate: float
    weight_decay: float
    clip: float
    z_loss: float


def orthogonalise(stack: Tensor) -> Tensor:
    """Approximate the nearest semi-orthogonal matrix of each matrix of `stack` [n, rows, columns]."""
    a, b, c = NEWTON_SCHULZ
    tall = stack.shape[1] > stack.shape[2]
    x = stack.mT if tall else stack
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16().contiguous()
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = torch.bmm(x, x.mT)
        x = a * x + torch.bmm(b * gram + c * torch.bmm(gram, gram), x)
    return (x.mT if tall else x).to(stack.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, with decoupled weight decay."""

    def __init__(
        self, params: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes[parameter.shape].append(parameter)
            for shape, parameters in shapes.items():
                updates = orthogonalise(torch.stack([self._momentum(p, group["momentum"]) for p in parameters]))
                scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.mul_(1.0 - group["lr"] * group["weight_decay"]).add_(update, alpha=-scale)

    def _momentum(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        """The Nesterov-corrected running mean of the gradients."""
        state = self.state[parameter]
        grad = parameter.grad
        assert grad is not None
        if "mean" not in state:
            state["mean"] = torch.zeros_like(grad)
        state["mean"].lerp_(grad, 1.0 - momentum)
        return grad.lerp(state["mean"], momentum)


def build_optimizers(model: nn.Module, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """Muon over the matrices of the layers, AdamW over everything else."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (matrices if parameter.dim() == 2 and ".layers." in name else others).append(parameter)
    adam = torch.optim.AdamW(others, lr=config.adam_rate, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    return [Muon(matrices, lr=config.muon_rate, weight_decay=config.weight_decay), adam]


def rate_factor(config: OptimConfig, step: int, progress: float) -> float:
    """Multiplier of both rates: linear warm-up in steps, constant, then linear decay over the last of the budget."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    if progress <= config.decay_begin:
        return warm
    left = max(0.0, 1.0 - progress) / (1.0 - config.decay_begin)
    return warm * (config.final_rate + (1.0 - config.final_rate) * left)


def set_rates(optimizers: list[torch.optim.Optimizer], config: OptimConfig, factor: float) -> None:
    """Give each optimizer its base rate times `factor`."""
    for optimizer, base in zip(optimizers, (config.muon_rate, config.adam_rate), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = base * factor
