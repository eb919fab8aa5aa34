"""A batch as one array of int32, as it goes from rank 0 to the others."""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import numpy as np

from headrace.core.batch import Batch, Ints, StepShape

_ARRAYS = (
    "ids",
    "positions",
    "write_slots",
    "query_starts",
    "context_starts",
    "context_slots",
    "mask_starts",
    "mask_words",
    "head_rows",
    "adapters",
)
_SHAPE = 5
_SPLIT = 1 << 31  # numbers of a shape may exceed 32 bits: each goes as two


def pack(batch: Batch) -> Ints:
    """``batch`` as int32[n]: lengths of its arrays, its shape, then the arrays."""
    arrays: list[Ints] = [getattr(batch, name) for name in _ARRAYS]
    shape = [part for number in astuple(batch.shape) for part in divmod(number, _SPLIT)]
    head = np.array([*map(len, arrays), *shape], np.int32)
    return np.concatenate([head, *arrays])


def unpack(data: Ints) -> Batch:
    """The batch of :func:`pack`, over views of ``data``."""
    at = len(_ARRAYS) + 2 * _SHAPE
    lengths, parts = data[: len(_ARRAYS)].tolist(), data[len(_ARRAYS) : at].tolist()
    arrays: dict[str, Any] = {}
    for name, length in zip(_ARRAYS, lengths, strict=True):
        arrays[name] = data[at : at + length]
        at += length
    shape = StepShape(*(high * _SPLIT + low for high, low in zip(parts[::2], parts[1::2], strict=True)))
    return Batch(**arrays, shape=shape)
