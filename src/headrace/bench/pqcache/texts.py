"""What the trained models read: held-out texts and the tasks, as tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headrace.bench.pqcache.tasks import Language, Shape, make


def held_out(tokenizer: Any, length: int, windows: int) -> Tensor:
    """int64[windows, length]: the beginnings of held-out texts that are long enough, one document a window.

    Raises:
        ValueError: there are not so many.
    """
    from headrace.bench.closedloop.pair import heldout

    pieces = [tokenizer(piece["text"], add_special_tokens=False)["input_ids"] for piece in heldout()]
    found = [piece[:length] for piece in pieces if len(piece) >= length]
    if len(found) < windows:
        raise ValueError(f"{len(found)} held-out texts have {length} tokens, and {windows} were asked for")
    return torch.tensor(found[:windows])


def two_texts(tokenizer: Any, first: int, second: int) -> Tensor:
    """int64[1, first + second]: the beginning of a novel, then that of a Python module."""
    from headrace.bench.closedloop.pair import heldout

    texts = {piece["source"]: piece["text"] for piece in heldout()}
    ids = [tokenizer(texts[name], add_special_tokens=False)["input_ids"] for name in ("eltec_eng", "python_stdlib")]
    return torch.tensor([[*ids[0][:first], *ids[1][:second]]])


def answered(language: Language, family: str, length: int, rows: int, seed: int, **shape: int) -> Tensor:
    """int64[rows, length]: contexts of a task with their questions and answers behind them, cut to ``length``."""
    found = []
    tail = sum(len(q.suffix) + len(q.answer) for q in make(family, language, Shape(length, **shape), seed).questions)
    for row in range(rows):
        questions: list[int] = []
        task = make(family, language, Shape(length - tail, **shape), seed + row)
        for question in task.questions:
            questions += [*question.suffix, *question.answer]
        found.append([*task.context, *questions][:length])
    return torch.tensor(found)


def shifted(language: Language, prompt: int, answer: int, seed: int) -> Tensor:
    """int64[1, prompt + answer]: facts in one half of the words, then, as a long answer, facts in the other and repetitions of them.

    What the answer attends to is its own earlier text, in words that the prompt lacks: centroids fitted on the prompt do not know
    them.
    """
    half = len(language.filler) // 2
    parts: list[int] = []
    for number, words in enumerate((language.filler[:half], language.filler[half:])):
        quarter = len(words) // 4
        tongue = Language(
            language.start, language.ask, language.define, language.stop, language.markers,
            words[:quarter], words[quarter : 2 * quarter], words[2 * quarter :],
        )  # fmt: skip
        size = prompt if number == 0 else answer
        asked = Shape(size // 2, questions=10_000, spacing=48)
        task = make("multikey", tongue, asked, seed + number)
        tokens = [*task.context, *(token for q in task.questions for token in (*q.suffix, *q.answer))]
        while len(tokens) < size:
            tokens += tokens[1 : 1 + size - len(tokens)]
        parts += tokens[:size]
    return torch.tensor([parts])
