"""Packing against a plain-Python reading of the layout."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.core.batch import Packer, Segment, StepShape, ancestor_words, step_shape


def ints(values: list[int]) -> np.ndarray:
    return np.array(values, np.int32)


@st.composite
def segments(draw: st.DrawFn) -> Segment:
    rows = draw(st.integers(1, 70))
    context = draw(st.integers(0, 20))
    parents = None
    if draw(st.booleans()):
        parents = ints([draw(st.integers(-1, i - 1)) for i in range(rows)])
    wanted = draw(st.sets(st.integers(0, rows - 1), max_size=4))
    numbers = st.integers(0, 10_000)
    return Segment(
        sequence=draw(numbers),
        tokens=ints([draw(numbers) for _ in range(rows)]),
        positions=np.arange(context, context + rows, dtype=np.int32),
        write_slots=ints(draw(st.permutations(range(rows)))),
        context_slots=ints(draw(st.permutations(range(context)))),
        wanted=ints(sorted(wanted)),
        parents=parents,
        adapter=draw(st.integers(0, 3)),
    )


@given(st.lists(segments(), max_size=5), st.lists(segments(), max_size=3))
def test_every_segment_is_found_again(parts: list[Segment], before: list[Segment]) -> None:
    packer = Packer()
    packer.pack(before)  # buffers that held something else
    batch = packer.pack(parts)
    assert batch.segments == len(parts)
    assert batch.tokens == sum(len(p.tokens) for p in parts)
    heads = []
    for s, part in enumerate(parts):
        rows = slice(batch.query_starts[s], batch.query_starts[s + 1])
        held = slice(batch.context_starts[s], batch.context_starts[s + 1])
        words = batch.mask_words[batch.mask_starts[s] : batch.mask_starts[s + 1]]
        assert (batch.ids[rows] == part.tokens).all()
        assert (batch.positions[rows] == part.positions).all()
        assert (batch.write_slots[rows] == part.write_slots).all()
        assert (batch.context_slots[held] == part.context_slots).all()
        assert batch.adapters[s] == part.adapter
        expected = ints([]) if part.parents is None else ancestor_words(part.parents).ravel()
        assert (words == expected).all()
        heads += [int(rows.start) + w for w in part.wanted.tolist()]
    assert batch.head_rows.tolist() == heads
    assert batch.shape == step_shape(parts)


@given(st.lists(st.integers(-1, 80), min_size=1, max_size=80))
def test_bits_are_the_ancestors(raw: list[int]) -> None:
    parents = [min(p, i - 1) for i, p in enumerate(raw)]
    words = ancestor_words(ints(parents)).view(np.uint32)
    for row in range(len(parents)):
        seen, at = set(), row
        while at >= 0:
            seen.add(at)
            at = parents[at]
        bits = {j for j in range(len(parents)) if words[row, j // 32] >> (j % 32) & 1}
        assert bits == seen


@pytest.mark.parametrize("parents", [[0], [-1, 1], [-1, -2], [-1, 0, 5]])
def test_a_parent_comes_before_its_child(parents: list[int]) -> None:
    with pytest.raises(ValueError, match="parent must come before"):
        ancestor_words(ints(parents))


def test_shape_tells_prompts_from_decodes_and_trees() -> None:
    def segment(rows: int, context: int, tree: bool = False) -> Segment:
        parents = ints([-1] + [0] * (rows - 1)) if tree else None
        return Segment(0, ints([0] * rows), ints([0] * rows), ints([0] * rows), ints([0] * context), ints([0]), parents)

    shape = step_shape([segment(10, 0), segment(1, 5), segment(4, 7, tree=True)])
    assert shape == StepShape(
        prefill_tokens=10, decode_tokens=5, context=12, sequences=3, attended=10 * 10 + 1 * 6 + 4 * 11
    )
