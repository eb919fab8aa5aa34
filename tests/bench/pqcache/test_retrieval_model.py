"""The checkpoint of ``recipes/retrieval`` answers what the benchmark asks it."""

from __future__ import annotations

import pytest
import torch

from headrace.bench.pqcache.methods import DENSE, Started, attend_by, greedy, read
from headrace.bench.pqcache.quality import FULL, TRAINED, trained_model
from headrace.bench.pqcache.tasks import Shape, make

pytestmark = pytest.mark.skipif(not TRAINED.is_dir(), reason="recipes/retrieval has not been run to its end")


def test_it_solves_its_families_dense() -> None:
    """A sample at half the benchmark's length, of other seeds than the benchmark's."""
    language, model = trained_model()
    right = asked = 0
    for exam in FULL.trained:
        for family in exam.families:
            task = make(family, language, Shape(512, value=6, hops=3, spacing=32, questions=3), seed=3)
            started = Started(DENSE, model, read(model, torch.tensor([task.context])))
            attend_by(DENSE, model)
            for question in task.questions:
                said = greedy(model, started.cache(1.0), question.suffix, len(question.answer))
                right, asked = right + (tuple(said) == question.answer), asked + 1
    assert right >= 0.9 * asked


def test_it_is_small() -> None:
    assert (TRAINED / "model.safetensors").stat().st_size < 2_000_000
