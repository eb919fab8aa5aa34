"""Edits of a row of logits before sampling: penalties, bias, and tokens that may not come now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from headrace.core.request import SamplingParams
from headrace.engine.history import History
from headrace.engine.sampling.distribution import Floats

_WORD_BITS = 32


class Grammar(Protocol):
    """What the sampler needs of a grammar's state."""

    def fill(self, words: NDArray[np.int32]) -> bool:
        """Write the allowed tokens to ``words`` (bit ``t % 32`` of word ``t // 32``); False when every token is."""


def penalised(params: SamplingParams) -> bool:
    """Whether any penalty is on."""
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


def apply_penalties(row: Floats, history: History, params: SamplingParams) -> None:
    """Apply the repetition penalty (prompt and output), then the frequency and presence penalties (output), in place."""
    ids, counts = history.ids, history.counts
    inside = ids < len(row)
    if not inside.all():
        ids, counts = ids[inside], counts[inside]
    values = row[ids]
    if params.repetition_penalty != 1.0:
        factor = np.float32(params.repetition_penalty)
        values = np.where(values > 0, values / factor, values * factor)
    if params.frequency_penalty != 0.0:
        values -= np.float32(params.frequency_penalty) * counts
    if params.presence_penalty != 0.0:
        values -= np.float32(params.presence_penalty) * (counts > 0)
    row[ids] = values


def apply_bias(row: Floats, bias: Mapping[int, float]) -> None:
    """Add ``bias`` in place; ids outside the vocabulary are ignored (padding and vocabulary sizes differ between models)."""
    for token, value in bias.items():
        if 0 <= token < len(row):
            row[token] += np.float32(value)


def apply_grammar(row: Floats, grammar: Grammar) -> None:
    """Set the logits of tokens the grammar does not allow to -inf, in place."""
    words = np.full(-(-len(row) // _WORD_BITS), -1, np.int32)
    if grammar.fill(words):
        allowed = np.unpackbits(words.view(np.uint8), count=len(row), bitorder="little")
        np.copyto(row, np.float32(-np.inf), where=allowed == 0)


def ban(row: Floats, tokens: Sequence[int]) -> None:
    """Set the logits of ``tokens`` to -inf, in place, unless nothing else is left.

    A grammar that is complete allows nothing but the end: the end then comes before ``min_tokens``.
    """
    ids = [token for token in tokens if 0 <= token < len(row)]
    held = row[ids]
    row[ids] = -np.inf
    if row.max() == -np.inf:
        row[ids] = held
