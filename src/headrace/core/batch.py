"""Segments and the packed batch: everything a model is asked to do in one step.

A :class:`Segment` is some tokens of one sequence; a :class:`Batch` is many of them packed back to back in flat int32 arrays
(CSR), which a runner executes in a single forward pass. Prompt chunks, decode tokens and draft trees are all segments:
a chain is the tree in which each token's parent is the token before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from headrace.core.retrieval import Retrieval

Purpose = Literal["prefill", "draft", "verify", "tune", "embed"]
Ints = NDArray[np.int32]

WORD_BITS = 32


@dataclass(slots=True)
class Segment:
    """Tokens of one sequence in one step.

    Attributes:
        sequence: the engine's number for the sequence.
        tokens: int32[n] ids to feed.
        positions: int32[n]; for a tree, context length plus depth.
        write_slots: int32[n], where each token's K and V go.
        context_slots: int32[c], slots of the committed context in order; slot j holds position j.
        parents: int32[n] index of each token's parent inside the segment, -1 for the committed context; None for a chain.
        wanted: int32[w] rows of the segment whose logits are needed, ascending.
        purpose: what the segment is for.
        adapter: row of the adapter table, 0 for none.
        kv: how its rows read the context, None for whole; only decode rows and draft trees may do otherwise.
    """

    sequence: int
    tokens: Ints
    positions: Ints
    write_slots: Ints
    context_slots: Ints
    wanted: Ints
    parents: Ints | None = None
    purpose: Purpose = "prefill"
    adapter: int = 0
    kv: Retrieval | None = None


@dataclass(frozen=True, slots=True)
class StepShape:
    """The size of a step, the key under which its cost is measured.

    ``prefill_tokens`` belong to segments longer than one row that verify no draft, ``decode_tokens`` to the rest;
    ``context`` is the sum of context lengths and ``attended`` the number of (query row, key) pairs before masking.
    """

    prefill_tokens: int
    decode_tokens: int
    context: int
    sequences: int
    attended: int

    def __add__(self, other: StepShape) -> StepShape:
        """The shape of a step that holds both."""
        return StepShape(
            self.prefill_tokens + other.prefill_tokens,
            self.decode_tokens + other.decode_tokens,
            self.context + other.context,
            self.sequences + other.sequences,
            self.attended + other.attended,
        )


@dataclass(frozen=True, slots=True)
class Retrieving:
    """A segment of a batch that reads a share of its context: its number in the batch, its sequence's, and how."""

    segment: int
    sequence: int
    kv: Retrieval


@dataclass(slots=True)
class Batch:
    """Packed segments. All index arrays are int32 and may be views of reused buffers: valid until the next pack.

    Attributes:
        ids, positions, write_slots: [N] per token.
        query_starts: [S + 1]; segment s owns rows ``query_starts[s]:query_starts[s + 1]``.
        context_starts, context_slots: [S + 1] and [C]; the committed context of each segment.
        mask_starts, mask_words: [S + 1] and [M]; ancestor bitmasks of tree segments. A tree of n rows has ``ceil(n / 32)`` words a row
            (row-major, bit ``j % 32`` of word ``j // 32`` set when row j is the row itself or an ancestor); a chain has none.
        head_rows: [R] rows that pass through the LM head, in segment order.
        adapters: [S] row of the adapter table per segment.
        shape: the size of the step.
        retrieving: the segments that read a share of their context; none unless the engine says so.
    """

    ids: Ints
    positions: Ints
    write_slots: Ints
    query_starts: Ints
    context_starts: Ints
    context_slots: Ints
    mask_starts: Ints
    mask_words: Ints
    head_rows: Ints
    adapters: Ints
    shape: StepShape
    retrieving: tuple[Retrieving, ...] = ()

    @property
    def tokens(self) -> int:
        """Rows in the batch."""
        return len(self.ids)

    @property
    def segments(self) -> int:
        """Segments in the batch."""
        return len(self.query_starts) - 1


def ancestor_words(parents: Ints) -> Ints:
    """Bitmask rows of a tree.

    Args:
        parents: int32[n], each below its own index, -1 for a root.

    Returns:
        int32[n, ceil(n / 32)]; bit j of row i is set when j is i or an ancestor of i.

    Raises:
        ValueError: when a parent does not come before its child.
    """
    n = len(parents)
    seen: list[int] = []  # per row its bits as one number: a tree is short, and numpy dear for single rows
    for row, parent in enumerate(parents.tolist()):
        if not -1 <= parent < row:
            raise ValueError(f"parents[{row}] is {parent}: a parent must come before its child (or be -1)")
        seen.append(1 << row | (seen[parent] if parent >= 0 else 0))
    words = np.empty((n, (n + WORD_BITS - 1) // WORD_BITS), np.uint32)
    for word in range(words.shape[1]):
        words[:, word] = [bits >> word * WORD_BITS & 0xFFFFFFFF for bits in seen]
    return words.view(np.int32)


@dataclass(slots=True)
class _Buffer:
    """A growing int32 array that is reused from step to step."""

    data: Ints = field(default_factory=lambda: np.empty(256, np.int32))

    def take(self, size: int) -> Ints:
        if size > len(self.data):
            self.data = np.empty(max(size, 2 * len(self.data)), np.int32)
        return self.data[:size]


class Packer:
    """Packs segments into a :class:`Batch` over buffers that are reused, so a decode step allocates nothing large."""

    def __init__(self) -> None:
        self._buffers = {
            name: _Buffer()
            for name in (
                "ids",
                "positions",
                "writes",
                "queries",
                "contexts",
                "slots",
                "masks",
                "words",
                "rows",
                "adapters",
            )
        }

    def pack(self, segments: Sequence[Segment]) -> Batch:
        """Pack ``segments`` in order; the result's arrays are overwritten by the next call."""
        count = len(segments)
        take = {name: buffer.take for name, buffer in self._buffers.items()}
        queries, contexts, masks = take["queries"](count + 1), take["contexts"](count + 1), take["masks"](count + 1)
        adapters = take["adapters"](count)
        words = [None if s.parents is None else ancestor_words(s.parents) for s in segments]
        queries[0] = contexts[0] = masks[0] = 0
        for i, segment in enumerate(segments):
            tree = words[i]
            queries[i + 1] = queries[i] + len(segment.tokens)
            contexts[i + 1] = contexts[i] + len(segment.context_slots)
            masks[i + 1] = masks[i] + (0 if tree is None else tree.size)
            adapters[i] = segment.adapter
        rows = take["rows"](sum(len(s.wanted) for s in segments))
        at = 0
        for i, segment in enumerate(segments):
            rows[at : at + len(segment.wanted)] = segment.wanted + queries[i]
            at += len(segment.wanted)
        return Batch(
            ids=_join([s.tokens for s in segments], take["ids"](int(queries[count]))),
            positions=_join([s.positions for s in segments], take["positions"](int(queries[count]))),
            write_slots=_join([s.write_slots for s in segments], take["writes"](int(queries[count]))),
            query_starts=queries,
            context_starts=contexts,
            context_slots=_join([s.context_slots for s in segments], take["slots"](int(contexts[count]))),
            mask_starts=masks,
            mask_words=_join([w.ravel() for w in words if w is not None], take["words"](int(masks[count]))),
            head_rows=rows,
            adapters=adapters,
            shape=step_shape(segments),
            retrieving=tuple(Retrieving(i, s.sequence, s.kv) for i, s in enumerate(segments) if s.kv is not None),
        )


def _join(parts: Sequence[Ints], out: Ints) -> Ints:
    if parts:
        np.concatenate(parts, out=out)
    return out


def step_shape(segments: Sequence[Segment]) -> StepShape:
    """The :class:`StepShape` of ``segments``."""
    prefill = decode = context = attended = 0
    for segment in segments:
        rows, held = len(segment.tokens), len(segment.context_slots)
        if rows > 1 and segment.parents is None and segment.purpose != "verify":
            prefill += rows
        else:
            decode += rows
        context += held
        attended += rows * (held + rows)
    return StepShape(prefill, decode, context, len(segments), attended)
