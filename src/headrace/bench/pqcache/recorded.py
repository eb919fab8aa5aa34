"""What selectors keep of real attention: keys, queries and values of trained models, replayed step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from headrace.bench.pqcache.methods import INITIAL, Method, Reading
from headrace.sparse.attend import add_rest
from headrace.sparse.regions import Regions
from headrace.sparse.selectors import Place, SelectedAttention, make
from headrace.sparse.selectors.sketching import ProductQuantised

STEPS = 24
"""Decode steps replayed of one context."""


def recorded_rows(
    name: str, context: Reading, methods: Sequence[Method], budgets: Iterable[float], progress: Callable[[str], None]
) -> list[dict[str, Any]]:
    """A row per method, budget and layer: means over the last steps of all rows and heads.

    ``mass`` is the share of the exact attention that falls on the tokens attended to, ``error`` the distance from the exact output over
    its length, ``recall`` the share of the oracle's tokens that were chosen too, ``middle_mass`` the mass without the tokens that every
    method attends to.
    """
    rows = []
    for budget in budgets:
        regions = Regions(budget, INITIAL)
        for method in methods:
            progress(f"{name}: {method.name} at {budget:g} on recorded attention")
            for layer in range(len(context.keys)):
                found = replay(context, layer, method, regions)
                rows.append(
                    {"part": "quality", "kind": "recorded", "model": name, "length": context.length, "method": method.name,
                     "budget": budget, "layer": layer, **found}
                )  # fmt: skip
    return rows


def replay(context: Reading, layer: int, method: Method, regions: Regions, steps: int = STEPS) -> dict[str, float]:
    """The last ``steps`` tokens of a context as decode steps of one layer, the tokens before them as the prompt."""
    keys, values, queries = flatten(context, layer)
    length, scale = keys.shape[1], context.scale
    prompt = length - steps
    place = Place(layer, len(context.keys))
    kind, options = selector_of(method)
    attention = SelectedAttention(make(kind, place, **options), regions)
    oracle = SelectedAttention(make("oracle", place), regions)
    attention.read(queries[:, :, :prompt], keys[:, :prompt], scale)
    sums = dict.fromkeys(("mass", "middle_mass", "error", "recall", "attended"), 0.0)
    for end in range(prompt + 1, length + 1):
        query = queries[:, :, end - 1]
        exact = (query @ keys[:, :end].transpose(1, 2) * scale).softmax(-1)
        dense = exact @ values[:, :end]
        step = attention.step(query, keys[:, :end], values[:, :end], scale)
        output = step.output
        if method.options.get("residual"):
            output = mended(attention, output, query, step.tokens, keys[:, :end], values[:, :end], scale)
        best = oracle.choose(query, keys[:, :end], scale)
        first, last = regions.window(prompt, end).middle(end)
        sums["mass"] += mass(exact, step.tokens)
        sums["middle_mass"] += middle_mass(exact, step.tokens, first, last)
        sums["error"] += float(((output - dense).norm(dim=-1) / dense.norm(dim=-1)).mean())
        sums["recall"] += recall(step.tokens, best, first, last)
        sums["attended"] += step.tokens.shape[1]
    return {key: total / steps for key, total in sums.items()}


def flatten(context: Reading, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values [R, L, D] and queries [R, G, L, D] of a layer, float32."""
    keys, values = context.keys[layer].flatten(0, 1).float(), context.values[layer].flatten(0, 1).float()
    _, _, length, size = context.queries[layer].shape
    return keys, values, context.queries[layer].reshape(len(keys), -1, length, size).float()


def selector_of(method: Method) -> tuple[str, dict[str, Any]]:
    """Name and options of the selector that chooses as a method does."""
    return method.kind, {key: value for key, value in method.options.items() if key != "residual"}


def mass(exact: Tensor, index: Tensor) -> float:
    """Mean share of attention weights [R, G, L] that falls on the tokens ``index`` [R, n]."""
    return float(exact.gather(2, index[:, None].expand(-1, exact.shape[1], -1)).sum(-1).mean())


def middle_mass(exact: Tensor, index: Tensor, first: int, last: int) -> float:
    """As :func:`mass`, of what falls on the tokens from ``first`` up to ``last`` - 1, summed over rows and heads."""
    inside = (index >= first) & (index < last)
    given = exact.gather(2, index[:, None].expand(-1, exact.shape[1], -1)) * inside[:, None]
    return float(given.sum() / exact[:, :, first:last].sum())


def recall(index: Tensor, best: Tensor, first: int, last: int) -> float:
    """Share of the middle's tokens in ``best`` that are in ``index`` too."""
    wanted = hit = 0
    for mine, theirs in zip(index.tolist(), best.tolist(), strict=True):
        middle = {token for token in theirs if first <= token < last}
        wanted, hit = wanted + len(middle), hit + len(middle & set(mine))
    return hit / max(1, wanted)


def mended(
    attention: SelectedAttention,
    output: Tensor,
    query: Tensor,
    index: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
) -> Tensor:
    """The output with the estimated weight of the tokens left out, which the index scores: ``residual`` of PQCache."""
    selector = attention.selector
    assert isinstance(selector, ProductQuantised)
    assert selector.index is not None
    first = selector.first
    last = first + selector.index.length
    chosen = keys.gather(1, index[..., None].expand(-1, -1, keys.shape[2]))
    total = (query @ chosen.transpose(1, 2) * scale).logsumexp(-1)
    left = torch.ones(len(index), keys.shape[1], dtype=torch.bool).scatter(1, index, False)[:, first:last]
    rest = selector.index.scores(query, scale).masked_fill(~left[:, None], -torch.inf).logsumexp(-1)
    return add_rest(output, total, rest, values[:, first:last].mean(1))
