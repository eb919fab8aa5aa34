"""Rows of task accuracy: every method answers the same questions on contexts that were read once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from headrace.bench.pqcache.methods import DENSE, Method, Started, attend_by, greedy, read
from headrace.bench.pqcache.tasks import Language, Shape, Task, make


@dataclass(frozen=True, slots=True)
class Exam:
    """What one model is asked: ``contexts`` seeds of every family at one shape."""

    families: tuple[str, ...]
    shape: Shape
    contexts: int
    seed: int = 1000


def task_rows(
    name: str,
    model: Any,
    language: Language,
    exams: Sequence[Exam],
    methods: Sequence[Method],
    budgets: Sequence[float],
    progress: Callable[[str], None],
) -> list[dict[str, Any]]:
    """A row per family, length, method and budget: items asked, answered right to the last token, and tokens right in front.

    Dense has the one row of budget 1.
    """
    rows = []
    plans = [(DENSE, (1.0,)), *((method, tuple(budgets)) for method in methods)]
    for exam in exams:
        for family in exam.families:
            progress(f"{name}: {family} at {exam.shape.length}")
            counts = {(method.name, budget): [0, 0, 0, 0] for method, some in plans for budget in some}
            for number in range(exam.contexts):
                task = make(family, language, exam.shape, exam.seed + number)
                context = read(model, torch.tensor([task.context]))
                for method, some in plans:
                    started = Started(method, model, context)
                    attend_by(method, model)
                    for budget in some:
                        _answer(model, started, budget, task, counts[method.name, budget])
            rows += [
                {
                    "part": "quality", "kind": "task", "model": name, "family": family, "length": exam.shape.length,
                    "method": method, "budget": budget, "items": items, "right": right, "front": front, "tokens": tokens,
                }
                for (method, budget), (items, right, front, tokens) in counts.items()
            ]  # fmt: skip
    return rows


def _answer(model: Any, started: Started, budget: float, task: Task, count: list[int]) -> None:
    """Add to ``count``: items, items right, tokens right in front, tokens."""
    for question in task.questions:
        said = greedy(model, started.cache(budget), question.suffix, len(question.answer))
        count[0] += 1
        count[1] += said == list(question.answer)
        count[2] += _front(said, question.answer)
        count[3] += len(question.answer)


def _front(said: Sequence[int], answer: Sequence[int]) -> int:
    """Tokens before the first wrong one."""
    return next((i for i, (a, b) in enumerate(zip(said, answer, strict=True)) if a != b), len(answer))
