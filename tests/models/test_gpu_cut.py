"""Tables of fixed size say what the exact ones say, and keys of batches; no GPU and no Triton needed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models.attention_cases import build

from headrace.core.batch import Batch
from headrace.models.attention import gpu_cut, gpu_static
from headrace.models.attention.gpu_cut import Spare, cut, cut_small, parts_needed
from headrace.models.attention.gpu_static import StaticStep, key_of, padded_rows

CONTEXTS = [0, 1, 31, gpu_cut.PART - 1, gpu_cut.PART, gpu_cut.PART + 1, 3 * gpu_cut.PART]


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Decode rows, short chains and trees."""
    shapes = []
    for _ in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from(["chain", "decode", "tree"]))
        shapes.append((kind, draw(st.sampled_from(CONTEXTS)), 1 if kind == "decode" else draw(st.integers(1, 12))))
    return build(np.random.default_rng(draw(st.integers(0, 1 << 32))), shapes).batch


@settings(max_examples=60, deadline=None)
@given(batch=batches(), window=st.sampled_from([None, 1, 5, 600]), group=st.sampled_from([1, 2, 5]))
def test_tables_of_fixed_size_hold_the_exact_ones(batch: Batch, window: int | None, group: int) -> None:
    key = key_of(batch, group)
    assert key is not None
    tables = cut_small(batch, window, key.spare)
    exact = list(cut(batch, group, window).values())
    tasks = sorted(map(tuple, np.concatenate([t.tasks for t in exact])[:, :10].tolist()))
    padding = key.spare.rows - batch.tokens
    assert len(tables.tasks) == key.spare.tasks >= len(tasks) + padding
    assert sorted(map(tuple, tables.tasks[: len(tasks), :10].tolist())) == tasks
    own = tables.tasks[len(tasks) : len(tasks) + padding]
    assert own[:, 0].tolist() == list(range(batch.tokens, key.spare.rows))
    assert (own[:, 1] == 1).all()
    assert (own[:, 5] == own[:, 0]).all()
    assert (own[:, 6] == own[:, 0] + 1).all()
    idle = tables.tasks[len(tasks) + padding :]
    assert not idle[:, :8].any()
    assert (idle[:, 10] == -1).all()
    merges = [row for t in exact for row in t.merges[:, [0, 1, 3]].tolist()]
    assert sorted(tables.merges[: len(merges), [0, 1, 3]].tolist()) == sorted(merges)
    assert not tables.merges[len(merges) :].any()


@settings(max_examples=60, deadline=None)
@given(batch=batches(), window=st.sampled_from([None, 5]))
def test_every_part_has_a_room_of_its_own_and_is_merged_once(batch: Batch, window: int | None) -> None:
    key = key_of(batch, 1)
    assert key is not None
    tables = cut_small(batch, window, key.spare)
    rooms = [room for room in tables.tasks[:, 10].tolist() if room >= 0]
    merged = [room for _, _, first, count in tables.merges.tolist() for room in range(first, first + count)]
    assert sorted(rooms) == sorted(merged) == sorted(set(rooms))
    assert all(room < tables.parts for room in rooms)


@pytest.mark.parametrize(
    ("tokens", "rows"), [(1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (128, 128), (129, 160), (256, 256)]
)
def test_rows_are_padded_to_few_sizes(tokens: int, rows: int) -> None:
    assert padded_rows(tokens) == rows


def test_what_no_graph_runs() -> None:
    rng = np.random.default_rng(0)
    assert padded_rows(0) is padded_rows(257) is None
    assert key_of(build(rng, [("chain", 5, 33)]).batch, group=2) is None, "more than a tile"
    assert key_of(build(rng, [("chain", 5, 32)]).batch, group=2) is not None
    assert key_of(build(rng, [("decode", 5, 1)]).batch, group=71) is None


def test_batches_of_like_size_share_a_key() -> None:
    rng = np.random.default_rng(0)
    one = build(rng, [("decode", 30, 1)] * 5).batch
    other = build(rng, [("decode", 300, 1)] * 7).batch
    longer = build(rng, [("decode", 3000, 1)] * 7).batch
    assert key_of(one, 4) == key_of(other, 4) == gpu_static.Key(Spare(8, 8), 1)
    assert parts_needed(longer) == 42
    assert key_of(longer, 4) == gpu_static.Key(Spare(8, 64), 1)


def test_buffers_stay_where_they_are_and_forget_the_last_batch() -> None:
    rng = np.random.default_rng(0)
    many, few = (build(rng, [("decode", 30, 1)] * n).batch for n in (8, 5))
    key = key_of(many, 4)
    assert key is not None
    step = StaticStep(key, slot=9, device=torch.device("cpu"))
    step.fill(many)
    (launch,) = step.launches_of(4, None).values()
    where = [t.data_ptr() for t in (step.ids, step.positions, step.writes, step.slots, launch.tasks, launch.merges)]
    step.fill(few)
    assert step.launches_of(4, None)[16] is launch
    assert where == [
        t.data_ptr() for t in (step.ids, step.positions, step.writes, step.slots, launch.tasks, launch.merges)
    ]
    assert step.writes.tolist() == [*few.write_slots.tolist(), 9, 9, 9]
    assert step.ids.tolist() == [*few.ids.tolist(), 0, 0, 0]
    assert step.slots[: len(few.context_slots)].tolist() == few.context_slots.tolist()
    assert launch.tasks.tolist() == cut_small(few, None, key.spare).tasks.tolist()
