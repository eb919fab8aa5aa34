"""The slot pool: reference counts, order of reuse, planes and misuse."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from headrace.models.cache.slots import OutOfSlots, SlotPool


def test_take_and_release_are_last_in_first_out() -> None:
    pool = SlotPool(8)
    assert pool.take(3).tolist() == [0, 1, 2]
    last = pool.take(2)
    pool.release(last)
    assert pool.take(2).tolist() == last.tolist()
    assert pool.take(0).dtype == np.int32


def test_running_out_takes_nothing() -> None:
    pool = SlotPool(4)
    pool.take(3)
    with pytest.raises(OutOfSlots) as caught:
        pool.take(2)
    assert (caught.value.wanted, caught.value.free, pool.free) == (2, 1, 1)


def test_shared_slots_stay_until_the_last_release() -> None:
    pool = SlotPool(4)
    held = pool.take(2)
    pool.share(held)
    pool.release(held)
    assert (pool.free, pool.refs(held).tolist()) == (2, [1, 1])
    pool.release(held)
    assert pool.free == 4


@pytest.mark.parametrize(
    ("slots", "match"),
    [([1, 1], "twice"), ([3], "free already"), ([-1], "from -1"), ([4], "to 4"), ([[0]], "one-dimensional")],
)
@pytest.mark.parametrize("method", ["share", "release"])
def test_misuse_is_refused_before_anything_changes(method: str, slots: list[int], match: str) -> None:
    pool = SlotPool(4)
    pool.take(3)
    with pytest.raises(ValueError, match=match):
        getattr(pool, method)(np.array(slots, np.int32))
    assert (pool.free, pool.refs([0, 1, 2, 3]).tolist()) == (1, [1, 1, 1, 0])


def test_double_release_is_detected() -> None:
    pool = SlotPool(4)
    held = pool.take(2)
    pool.release(held)
    with pytest.raises(ValueError, match="free already"):
        pool.release(held)
    assert pool.free == 4


@pytest.mark.parametrize(("call", "match"), [(lambda: SlotPool(0), "at least 1"), (lambda: SlotPool(2).take(-1), "-1")])
def test_bad_numbers(call: object, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()  # type: ignore[operator]


def test_planes_are_zeroed_and_named_once() -> None:
    pool = SlotPool(5)
    plane = pool.add_plane("k.0", (2, 3), torch.float16, "cpu")
    assert (plane.shape, plane.dtype, plane.abs().sum().item()) == ((5, 2, 3), torch.float16, 0)
    assert pool.plane("k.0") is plane
    assert list(pool.planes) == ["k.0"]
    with pytest.raises(ValueError, match="of that name"):
        pool.add_plane("k.0", (1,), torch.float32, "cpu")
    with pytest.raises(KeyError):
        pool.plane("k.1")


def test_on_free_hears_only_of_slots_that_became_free() -> None:
    pool, heard = SlotPool(6), []
    pool.add_plane("codes", (1,), torch.int8, "cpu", on_free=lambda slots: heard.append(slots.tolist()))
    held = pool.take(3)
    pool.share(held[:1])
    pool.release(held)
    assert heard == [[1, 2]]


def test_watchers_hear_of_every_change_but_take() -> None:
    pool, heard = SlotPool(6), []
    pool.watch(lambda slots: heard.append((slots.tolist(), pool.refs(slots).tolist())))
    held = pool.take(2)
    pool.share(held)
    pool.release(held[:1])
    assert heard == [([0, 1], [2, 2]), ([0], [1])]


def test_remap_copies_overlapping_rows_and_tells() -> None:
    pool, heard = SlotPool(6), []
    plane = pool.add_plane(
        "k", (2,), torch.float32, "cpu", on_remap=lambda old, new: heard.append((old.tolist(), new.tolist()))
    )
    plane[:] = torch.arange(6)[:, None]
    held = pool.take(4)
    pool.remap(held[1:], held[:3])
    assert plane[:, 0].tolist() == [1, 2, 3, 3, 4, 5]
    assert heard == [([1, 2, 3], [0, 1, 2])]
    with pytest.raises(ValueError, match="3 old slots but 1 new"):
        pool.remap(held[:3], held[3:])


def test_accounting_needs_no_torch() -> None:
    code = "import sys, headrace.models.cache.slots as s; p = s.SlotPool(4); p.release(p.take(2)); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


class PoolMachine(RuleBasedStateMachine):
    """Random take, share and release against a dictionary of counts."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = SlotPool(24)
        self.counts: dict[int, int] = {}

    @rule(n=st.integers(0, 30))
    def take(self, n: int) -> None:
        if n > 24 - len(self.counts):
            with pytest.raises(OutOfSlots):
                self.pool.take(n)
            return
        taken = self.pool.take(n).tolist()
        assert not set(taken) & set(self.counts)
        self.counts.update(dict.fromkeys(taken, 1))

    @precondition(lambda self: self.counts)
    @rule(data=st.data(), more=st.booleans())
    def change(self, data: st.DataObject, more: bool) -> None:
        slots = data.draw(st.lists(st.sampled_from(sorted(self.counts)), unique=True))
        (self.pool.share if more else self.pool.release)(np.array(slots, np.int32))
        for slot in slots:
            self.counts[slot] += 1 if more else -1
            if not self.counts[slot]:
                del self.counts[slot]

    @invariant()
    def counts_agree(self) -> None:
        assert self.pool.refs(np.arange(24)).tolist() == [self.counts.get(i, 0) for i in range(24)]
        assert self.pool.free == 24 - len(self.counts)


PoolMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestPool = PoolMachine.TestCase
