"""Training rows: the benchmark's own tasks with their questions answered one after another, and sequences that repeat themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from headrace.bench.pqcache.tasks import Language, Shape, Task, make

IGNORED = -100
SEEDS = 1 << 20
"""Training seeds start here; evaluation uses small ones."""

TASKS = ("needle", "multikey", "pairs", "variables", "moved")


def batches(language: Language, length: int, rows: int, copying: float, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (ids, labels), both int64[rows, length]; labels are IGNORED except where the next token can be known.

    Args:
        copying: share of rows that repeat themselves; the others are tasks.
    """
    rng = np.random.default_rng([seed, length])
    while True:
        made = [
            _repeating(language, length, rng) if rng.random() < copying else _task(language, length, rng)
            for _ in range(rows)
        ]
        ids, labels = (np.stack(part) for part in zip(*made, strict=True))
        yield torch.from_numpy(ids), torch.from_numpy(labels)


def _task(language: Language, length: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A context and as many questions with answers as fit behind it, in as many rows as it takes: exactly ``length`` tokens."""
    family = TASKS[rng.integers(len(TASKS))]
    value = int(rng.integers(2, 9))
    questions = int(rng.integers(2, max(3, min(13, length // 40))))
    # An answer with its question takes value + 4 tokens, a chain of three variables 7, and its statements 18.
    context = length - questions * max(value + 4, 10)
    shape = Shape(context, value=value, questions=questions, hops=3, spacing=int(rng.integers(8, 64)))
    if family == "needle":  # one question would be little to learn from
        family, shape = "multikey", replace(shape, spacing=length)
    if family in ("variables", "moved") and questions * (18 if family == "variables" else value + 9) > context - 2:
        family = "pairs"
    return lay_out(make(family, language, shape, SEEDS + int(rng.integers(1 << 30))), length)


def lay_out(task: Task, length: int) -> tuple[np.ndarray, np.ndarray]:
    """A task as one row: context, question, answer, question, answer ..., cut or filled up to ``length``."""
    ids, labels = list(task.context), [IGNORED] * len(task.context)
    for question in task.questions:
        ids += question.suffix + question.answer
        # The last token before an answer predicts its first.
        labels += [IGNORED] * (len(question.suffix) - 1) + [*question.answer, IGNORED]
        labels[-1 - len(question.answer)] = question.answer[0]
    ids, labels = ids[:length], labels[:length]
    ids += [task.context[0]] * (length - len(ids))
    labels += [IGNORED] * (length - len(labels))
    return np.array(ids, np.int64), np.array(labels, np.int64)


def _repeating(language: Language, length: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Random words, then spans of them again; a span's third token and later ones can be known."""
    words = np.array(language.names + language.values + language.filler)
    fresh = length // 2
    ids, labels = [language.start, *words[rng.integers(0, len(words), fresh - 1)].tolist()], [IGNORED] * fresh
    while len(ids) < length:
        size = int(rng.integers(6, 24))
        start = int(rng.integers(1, fresh - size))
        span = ids[start : start + size]
        labels[-1] = IGNORED
        ids += span
        labels += [IGNORED, *span[2:], IGNORED]
    return np.array(ids[:length], np.int64), np.array(labels[:length], np.int64)
