"""The prefix cache against a dictionary of prefixes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from headrace.models.cache.radix import RadixCache
from headrace.models.cache.slots import SlotPool

SIZE = 40


def filled(*runs: list[int]) -> tuple[SlotPool, RadixCache]:
    """A pool and a cache holding ``runs``, referenced by nobody else."""
    pool = SlotPool(SIZE)
    cache = RadixCache(pool)
    for run in runs:
        slots = pool.take(len(run))
        cache.insert("m", run, slots)
        pool.release(slots)
    return pool, cache


def lookup(pool: SlotPool, cache: RadixCache, run: list[int], namespace: str = "m") -> list[int]:
    """Slots that match ``run``, given back at once."""
    slots = cache.match(namespace, run)
    pool.release(slots)
    return slots.tolist()


def test_match_shares_and_insert_keeps_what_is_there() -> None:
    pool, cache = filled([1, 2, 3, 4])
    held = cache.match("m", [1, 2, 3, 9])
    assert (held.tolist(), pool.refs(held).tolist()) == ([0, 1, 2], [2, 2, 2])
    own = pool.take(5)
    assert cache.insert("m", [1, 2, 3, 7, 8], own) == 2
    assert lookup(pool, cache, [1, 2, 3, 7, 8, 9]) == [0, 1, 2, *own[3:].tolist()]
    assert pool.refs(own).tolist() == [1, 1, 1, 2, 2]
    assert cache.insert("m", [1, 2], pool.take(2)) == 0
    assert cache.size == 6


def test_namespaces_do_not_mix() -> None:
    pool, cache = filled([1, 2, 3])
    assert lookup(pool, cache, [1, 2, 3], "other") == []
    slots = pool.take(3)
    cache.insert(("m", "salt"), [1, 2, 3], slots)
    assert lookup(pool, cache, [1, 2, 3]) == [0, 1, 2]
    assert cache.match(("m", "salt"), [1, 2]).tolist() == slots[:2].tolist()


def test_empty_runs() -> None:
    pool, cache = filled([1])
    assert cache.match("m", []).tolist() == []
    assert cache.match("m", []).dtype == np.int32
    assert cache.insert("new", [], []) == 0
    assert (cache.size, pool.free) == (1, SIZE - 1)


def test_evicts_the_least_recently_used_leaf_from_its_end() -> None:
    pool, cache = filled([1, 2, 3, 4], [1, 2, 5, 6], [9, 9])
    lookup(pool, cache, [1, 2, 3, 4])
    assert cache.evict(1) == 1
    assert lookup(pool, cache, [1, 2, 5, 6]) == lookup(pool, cache, [1, 2, 5])
    assert cache.evict(2) == 2  # [9, 9] is the oldest now that [1, 2, 5] was looked at
    assert lookup(pool, cache, [9, 9]) == []
    assert len(lookup(pool, cache, [1, 2, 3, 4])) == 4
    assert cache.evict(100) == 5
    assert (cache.size, cache.evictable, pool.free) == (0, 0, SIZE)


def test_a_middle_node_under_a_used_leaf_stays() -> None:
    pool, cache = filled([1, 2, 3, 4], [1, 2, 5, 6])
    used = cache.match("m", [1, 2, 3, 4])
    pool.release(used[:3])  # only the last slot is referenced now, yet all above it must stay
    assert cache.evictable == 2
    assert cache.evict(10) == 2
    assert len(lookup(pool, cache, [1, 2, 3, 4])) == 4
    pool.release(used[3:])
    assert cache.evictable == 4


def test_clear_leaves_sequences_their_slots() -> None:
    pool, cache = filled([1, 2, 3])
    held = cache.match("m", [1, 2])
    cache.clear()
    assert (cache.size, cache.evictable, pool.free, pool.refs(held).tolist()) == (0, 0, SIZE - 2, [1, 1])
    assert cache.insert("m", [1, 2], held) == 2


@pytest.mark.parametrize(
    ("tokens", "slots", "match"),
    [([7, 8], [3], "2 tokens but 1 slots"), ([7], [30], "free"), ([7], [0], "already"), ([7, 8], [5, 5], "twice")],
)
def test_bad_inserts_change_nothing(tokens: list[int], slots: list[int], match: str) -> None:
    pool, cache = filled([1, 2, 3])
    pool.take(5)
    before = pool.refs(np.arange(SIZE)).tolist()
    with pytest.raises(ValueError, match=match):
        cache.insert("m", tokens, slots)
    assert pool.refs(np.arange(SIZE)).tolist() == before
    assert (cache.size, lookup(pool, cache, tokens)) == (3, [])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 500), min_size=1, max_size=4), st.integers(0, 1 << 30))
def test_long_runs_diverge_anywhere(cuts: list[int], seed: int) -> None:
    """Runs of hundreds of tokens that leave a common stem at any place."""
    stem = np.random.default_rng(seed).integers(0, 50_000, 500)
    pool = SlotPool(5000)
    cache = RadixCache(pool)
    kept: dict[int, list[int]] = {}
    for number, cut in enumerate([500, *cuts]):
        run = np.concatenate([stem[:cut], np.full(20, 60_000 + number)])
        prefix = cache.match("m", run)
        slots = np.concatenate([prefix, pool.take(len(run) - len(prefix))])
        cache.insert("m", run, slots)
        kept[number] = slots.tolist()
        pool.release(slots)
    for number, cut in enumerate([500, *cuts]):
        run = np.concatenate([stem[:cut], np.full(20, 60_000 + number)])
        assert lookup(pool, cache, run.tolist()) == kept[number]


class CacheMachine(RuleBasedStateMachine):
    """Random sequences that match, insert, share, release and evict, against prefixes spelled out."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = SlotPool(SIZE)
        self.cache = RadixCache(self.pool)
        self.known: dict[tuple[int, tuple[int, ...]], int] = {}  # (namespace, prefix) -> slot of its last token
        self.held: list[list[int]] = []  # references that sequences own

    def expected(self, space: int, tokens: list[int]) -> list[int]:
        found: list[int] = []
        for end in range(1, len(tokens) + 1):
            slot = self.known.get((space, tuple(tokens[:end])))
            if slot is None:
                break
            found.append(slot)
        return found

    def evictable(self) -> int:
        """Prefixes that nobody uses and whose every continuation nobody uses."""
        used = {slot for slots in self.held for slot in slots}
        return sum(
            not any(
                space == other and longer[: len(prefix)] == prefix and slot in used
                for (other, longer), slot in self.known.items()
            )
            for space, prefix in self.known
        )

    @rule(space=st.integers(0, 1), tokens=st.lists(st.integers(0, 2), max_size=8), fresh=st.booleans())
    def serve(self, space: int, tokens: list[int], fresh: bool) -> None:
        """A sequence matches (or, computed at the same time as another, does not), takes the rest and inserts."""
        prefix = self.cache.match(space, tokens)
        assert prefix.tolist() == self.expected(space, tokens)
        if fresh:
            self.pool.release(prefix)
            prefix = prefix[:0]
        if len(tokens) - len(prefix) > self.pool.free:
            self.pool.release(prefix)
            return
        slots = np.concatenate([prefix, self.pool.take(len(tokens) - len(prefix))])
        new = self.cache.insert(space, tokens, slots)
        known = len(self.expected(space, tokens))
        assert new == len(tokens) - known
        for end in range(known, len(tokens)):
            self.known[space, tuple(tokens[: end + 1])] = int(slots[end])
        if len(slots):
            self.held.append(slots.tolist())

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        slots = data.draw(st.sampled_from(self.held))
        part = slots[: data.draw(st.integers(1, len(slots)))]
        self.pool.share(part)
        self.held.append(list(part))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        """Give back some references of a sequence, in any order."""
        at = data.draw(st.integers(0, len(self.held) - 1))
        given_back = data.draw(st.lists(st.sampled_from(self.held[at]), unique=True, min_size=1))
        self.pool.release(given_back)
        left = [slot for slot in self.held[at] if slot not in given_back]
        self.held[at : at + 1] = [left] if left else []

    @rule(n=st.integers(0, 12))
    def evict(self, n: int) -> None:
        possible = self.evictable()
        used = {slot for slots in self.held for slot in slots}
        assert self.cache.evict(n) == min(n, possible)
        kept = {k: slot for k, slot in self.known.items() if len(self.stored(*k)) == len(k[1])}
        gone = set(self.known) - set(kept)
        assert len(gone) == min(n, possible)
        assert not {self.known[k] for k in gone} & used
        self.known = kept

    def stored(self, space: int, prefix: tuple[int, ...]) -> list[int]:
        """What the cache holds of ``prefix``, read without touching the order of use."""
        _, parts, _ = self.cache._walk(space, np.array(prefix, np.int32))
        return np.concatenate(parts).tolist() if parts else []

    @precondition(lambda self: self.known)
    @rule()
    def clear(self) -> None:
        self.cache.clear()
        self.known.clear()

    @invariant()
    def books_balance(self) -> None:
        refs = np.zeros(SIZE, int)
        for slots in [*self.held, list(self.known.values())]:
            np.add.at(refs, np.array(slots, int), 1)
        assert self.pool.refs(np.arange(SIZE)).tolist() == refs.tolist()
        assert self.pool.free == int((refs == 0).sum())
        assert self.cache.size == len(self.known)
        assert self.cache.evictable == self.evictable()


CacheMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestCache = CacheMachine.TestCase


def test_a_node_cut_before_a_held_slot_knows_its_free_end() -> None:
    """Only a slot in the middle is held, then another sequence branches off before it: both parts count right."""
    pool = SlotPool(16)
    cache = RadixCache(pool)
    first = pool.take(3)
    cache.insert(0, [1, 1, 1], first)
    pool.release(first[[0, 2]])
    assert cache.evictable == 1
    second = pool.take(1)
    cache.insert(0, [1, 2], np.array([first[0], second[0]]))
    assert cache.evictable == 1
    pool.release(first[1:2])
    assert cache.evictable == 2, "the branch's own slot is held, and so is what leads to it only by its child"
    pool.release(second)
    assert cache.evictable == 4
    assert cache.evict(4) == 4
    assert pool.free == 16
