"""Cross-entropy and distillation losses that never hold the logits of a whole batch.

For a linear head the gradient of the loss with respect to the logits is `softmax(logits) - target`, so one
pass over chunks of rows gives the loss, the gradient of the hidden states and the gradient of the head together;
the logits of a chunk (rows x vocabulary) are the largest tensor alive. The backward pass only scales.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CHUNK_ROWS = 1024


def _hard_chunk(logits: Tensor, labels: Tensor, weights: Tensor, z_scale: float) -> tuple[Tensor, Tensor]:
    """Weighted loss of one chunk and its gradient: `logits` [n, V], `labels` and `weights` [n]."""
    wide = logits.float()
    norm = torch.logsumexp(wide, dim=-1, keepdim=True)
    picked = wide.gather(1, labels[:, None])
    loss = ((norm - picked) * weights[:, None]).sum()
    columns = torch.arange(wide.shape[1], device=wide.device)
    slope = torch.exp(wide - norm) * (1.0 + 2.0 * z_scale * norm) - (columns[None, :] == labels[:, None]).float()
    return loss, (slope * weights[:, None]).to(logits.dtype)


def _soft_chunk(
    logits: Tensor, labels: Tensor, weights: Tensor, teacher: Tensor, blend: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_hard_chunk` against `blend` x teacher distribution + (1 - blend) x label; also counts equal argmaxes."""
    wide = logits.float()
    norm = torch.logsumexp(wide, dim=-1, keepdim=True)
    wide_teacher = teacher.float()
    target = torch.softmax(wide_teacher, dim=-1) * blend
    columns = torch.arange(wide.shape[1], device=wide.device)
    target = target + (columns[None, :] == labels[:, None]).float() * (1.0 - blend)
    loss = ((norm - (target * wide).sum(-1, keepdim=True)) * weights[:, None]).sum()
    slope = (torch.exp(wide - norm) - target) * weights[:, None]
    return loss, slope.to(logits.dtype), (wide.argmax(-1) == wide_teacher.argmax(-1)).float().sum()


class LossKernels:
    """The chunk functions, compiled or not; one object a training run."""

    def __init__(self, compiled: bool) -> None:
        self.hard: Callable[..., Any] = torch.compile(_hard_chunk, dynamic=False) if compiled else _hard_chunk
        self.soft: Callable[..., Any] = torch.compile(_soft_chunk, dynamic=False) if compiled else _soft_chunk


class _HeadLoss(torch.autograd.Function):
    """sum_i weights_i * loss_i for a linear head, gradients made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        labels: Tensor,
        weights: Tensor,
        kernels: LossKernels,
        z_scale: float,
        teacher: Callable[[int, int], Tensor] | None,
        blend: float,
    ) -> tuple[Tensor, Tensor]:
        narrow = head.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_head = torch.zeros_like(head)
        total = torch.zeros((), device=hidden.device)
        agree = torch.zeros((), device=hidden.device)
        for start in range(0, hidden.shape[0], CHUNK_ROWS):
            stop = min(start + CHUNK_ROWS, hidden.shape[0])
            rows = hidden[start:stop]
            logits = rows @ narrow.t()
            if teacher is None:
                loss, slope = kernels.hard(logits, labels[start:stop], weights[start:stop], z_scale)
            else:
                given = teacher(start, stop)
                loss, slope, same = kernels.soft(logits, labels[start:stop], weights[start:stop], given, blend)
                agree += same
            total += loss
            torch.mm(slope, narrow, out=grad_hidden[start:stop])
            grad_head += (slope.t() @ rows).float()
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.mark_non_differentiable(agree)
        return total, agree

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        scale = grads[0]
        return grad_hidden * scale.to(grad_hidden.dtype), grad_head * scale, None, None, None, None, None, None


def label_loss(
    hidden: Tensor, head: Tensor, labels: Tensor, weights: Tensor, kernels: LossKernels, z_scale: float = 0.0
) -> Tensor:
    """Weighted sum of cross-entropies in nats: `hidden` [N, D], `head` [V, D], `labels` and `weights` [N]."""
    loss, _ = _HeadLoss.apply(hidden, head, labels, weights, kernels, z_scale, None, 0.0)
    return loss


def teacher_loss(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    weights: Tensor,
    kernels: LossKernels,
    teacher: Callable[[int, int], Tensor],
    blend: float,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy against the blended target and the number of rows whose argmax equals the teacher's.

    `teacher(start, stop)` gives the teacher's logits [stop - start, V] of those rows.
    """
    return _HeadLoss.apply(hidden, head, labels, weights, kernels, 0.0, teacher, blend)
