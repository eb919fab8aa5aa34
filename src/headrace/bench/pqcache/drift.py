"""Long answers: how much attention an index keeps whose centroids were fitted on the prompt, one that is refitted, and a fresh one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from headrace.bench.pqcache.methods import INITIAL, Reading
from headrace.bench.pqcache.recorded import flatten, mass, middle_mass
from headrace.sparse.regions import Regions
from headrace.sparse.selectors import SelectedAttention, make

EVERY = 32
"""Steps between two looks at the index; it is brought up to date at each, which codes the same tokens in the same way as every step."""


def drift_rows(
    name: str,
    context: Reading,
    prompt: int,
    codes: Sequence[str],
    rules: Sequence[float | None],
    budget: float,
    progress: Callable[[str], None],
) -> list[dict[str, Any]]:
    """A row per layer, code and rule (a value of ``refresh``): mass kept in the last quarter of the answer, and by a fresh index there.

    Args:
        context: prompt and answer in one.
        prompt: tokens of the prompt; the rest is the answer.
    """
    rows = []
    for code in codes:
        for layer in range(len(context.keys)):
            progress(f"{name}: {code} over {context.length - prompt} decoded tokens, layer {layer}")
            for rule, kept in _masses(context, layer, prompt, code, rules, budget).items():
                rows.append(
                    {"part": "quality", "kind": "drift", "model": name, "layer": layer, "prompt": prompt,
                     "answer": context.length - prompt, "codes": code, "budget": budget, "refresh": rule, **kept}
                )  # fmt: skip
    return rows


def _masses(
    context: Reading, layer: int, prompt: int, code: str, rules: Sequence[float | None], budget: float
) -> dict[float | None, dict[str, float]]:
    keys, _, queries = flatten(context, layer)
    length, scale, regions = keys.shape[1], context.scale, Regions(budget, INITIAL)
    kept: dict[float | None, dict[str, float]] = {}
    attentions = {rule: SelectedAttention(make("pq", codes=code, refresh=rule), regions) for rule in rules}
    sums = {rule: [0.0, 0.0] for rule in rules}
    fresh = [0.0, 0.0]
    late = length - (length - prompt) // 4
    looks = 0
    for end in range(prompt + 1, length + 1, EVERY):
        query, known = queries[:, :, end - 1], keys[:, :end]
        chosen = {rule: attention.choose(query, known, scale) for rule, attention in attentions.items()}
        if end <= late:
            continue
        looks += 1
        first, last = regions.window(prompt, end).middle(end)
        exact = (query @ known.transpose(1, 2) * scale).softmax(-1)
        new = SelectedAttention(make("pq", codes=code), regions)
        new.prompt = prompt
        for total, index in ((fresh, new.choose(query, known, scale)), *((sums[rule], chosen[rule]) for rule in rules)):
            total[0] += mass(exact, index)
            total[1] += middle_mass(exact, index, first, last)
    for rule in rules:
        kept[rule] = {
            "mass": sums[rule][0] / looks, "middle_mass": sums[rule][1] / looks,
            "mass_fresh": fresh[0] / looks, "middle_mass_fresh": fresh[1] / looks, "looks": looks,
        }  # fmt: skip
    return kept
