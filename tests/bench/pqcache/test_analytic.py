"""The model set by hand answers every family without error, and stops doing so when a head of it is taken away."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from headrace.bench.pqcache.analytic import CODE, HEAD, analytic_model, token_codes
from headrace.bench.pqcache.quality import bundled_language
from headrace.bench.pqcache.tasks import FAMILIES, Language, Shape, make, synthetic

LANGUAGE = synthetic(1024)
SHAPE = Shape(768, questions=2)


def _right(model: Any, family: str, seed: int, language: Language = LANGUAGE) -> list[bool]:
    task, found = make(family, language, SHAPE, seed), []
    for question in task.questions:
        ids = torch.tensor([task.context + question.suffix])
        said = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=len(question.answer),
            do_sample=False,
            pad_token_id=0,
        )
        found.append(tuple(said[0, ids.shape[1] :].tolist()) == question.answer)
    return found


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_solved(family: str) -> None:
    model = analytic_model(LANGUAGE, 1024)
    assert all(right for seed in range(2) for right in _right(model, family, seed))


@pytest.mark.parametrize("family", ["multikey", "variables", "moved"])
def test_the_words_of_a_tokenizer_will_do(family: str) -> None:
    language, size = bundled_language()
    assert all(_right(analytic_model(language, size), family, 0, language))


@pytest.mark.parametrize(("heads", "family"), [((0, 1), "needle"), ((2, 3), "variables"), ((2, 3), "moved")])
def test_it_needs_its_heads(heads: tuple[int, ...], family: str) -> None:
    """Negative control: without the copying heads no value is read to its end, without lookup no chain is followed."""
    model = analytic_model(LANGUAGE, 1024)
    with torch.no_grad():
        for head in heads:
            model.model.layers[1].self_attn.o_proj.weight[:, head * HEAD : (head + 1) * HEAD] = 0.0
    assert not any(_right(model, family, 0))


def test_the_first_layer_looks_back_far_from_the_start_too() -> None:
    model = analytic_model(LANGUAGE, 1024)
    model.set_attn_implementation("eager")
    ids = torch.randint(4, 1024, (1, 40), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(100_000, 100_040)[None]
    with torch.inference_mode():
        weights = model(ids, position_ids=positions, output_attentions=True).attentions[0][0]
    for head, back in enumerate((1, 2, 3, 1)):
        assert weights[head].diagonal(-back).min() > 0.999


@pytest.mark.parametrize(("count", "limit"), [(1024, 0.45), (4000, 0.57)])
def test_codes_are_of_one_length_and_far_apart(count: int, limit: float) -> None:
    codes = token_codes(count)
    products = codes @ codes.T
    assert codes.shape == (count, CODE)
    assert np.allclose(products.diagonal(), 1.0)
    np.fill_diagonal(products, -1.0)
    assert products.max() < limit
