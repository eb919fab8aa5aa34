"""Likelihood under teacher forcing: a prompt is read exactly, and the rest of the text is forced through decode steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from headrace.bench.pqcache.methods import DENSE, Method, Started, attend_by, read


def forced_rows(
    name: str,
    model: Any,
    windows: Tensor,
    prompt: int,
    methods: Sequence[Method],
    budgets: Iterable[float],
    progress: Callable[[str], None],
) -> list[dict[str, Any]]:
    """A row per window, method and budget: nats per token, the difference from dense on the same tokens, and how far the predictions
    are from dense's (Kullback-Leibler divergence, nats per token), which no luck can make small.

    Args:
        windows: int64[B, L], texts of one length, forced side by side.
        prompt: tokens of each that are read exactly.
    """
    context = read(model, windows[:, :prompt])
    progress(f"{name}: dense under teacher forcing")
    exact = force(attend_by(DENSE, model), Started(DENSE, model, context).cache(1.0), windows, prompt)
    wanted = windows[:, prompt + 1 :]
    base = _losses(exact, wanted).tolist()
    rows: list[dict[str, Any]] = []
    for method in methods:
        started = Started(method, model, context)
        for budget in budgets:
            progress(f"{name}: {method.name} at {budget:g} under teacher forcing")
            found = force(attend_by(method, model), started.cache(budget), windows, prompt)
            losses, away = _losses(found, wanted).tolist(), (exact.exp() * (exact - found)).sum(-1).mean(1).tolist()
            rows += [
                {"part": "quality", "kind": "forced", "model": name, "window": number, "prompt": prompt,
                 "length": windows.shape[1], "tokens": wanted.shape[1], "method": method.name, "budget": budget, "nll": loss,
                 "nll_dense": dense, "gap": loss - dense, "divergence": distance}
                for number, (loss, dense, distance) in enumerate(zip(losses, base, away, strict=True))
            ]  # fmt: skip
    return rows


def force(model: Any, cache: Any, windows: Tensor, prompt: int) -> Tensor:
    """What decode steps after ``prompt`` predict, token by token: float32[B, L - prompt - 1, V], logarithms of probabilities."""
    found = []
    with torch.inference_mode():
        for place in range(prompt, windows.shape[1] - 1):
            logits = model(windows[:, place : place + 1], past_key_values=cache, logits_to_keep=1).logits[:, -1]
            found.append(logits.float().log_softmax(-1))
    return torch.stack(found, 1)


def _losses(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean nats per token of each window: float32[B]."""
    return -found.gather(2, wanted[..., None])[..., 0].mean(1)
