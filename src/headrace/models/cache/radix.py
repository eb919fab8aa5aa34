"""Prefix cache: a radix tree over tokens whose nodes own the slots of their tokens.

The tree holds one reference per slot in the pool; a sequence that uses a cached prefix holds another. A slot may be evicted
when nobody but the tree references it and the same is true of everything below it. How many such slots there are is kept
up to date as reference counts change (the pool tells), so reading :attr:`RadixCache.evictable` costs nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from headrace.models.cache.slots import SlotPool

Ints = NDArray[np.int32]

_NONE = np.empty(0, np.int32)
_NOBODY = -1


class _Node:
    """A run of tokens with their slots.

    ``tail`` counts the slots at the node's end that only the tree references, ``blocked`` the children that could not be evicted whole.
    """

    __slots__ = ("blocked", "children", "number", "parent", "slots", "tail", "tokens")

    def __init__(self, number: int, parent: _Node | None, tokens: Ints, slots: Ints) -> None:
        self.number = number
        self.parent = parent
        self.tokens = tokens
        self.slots = slots
        self.children: dict[int, _Node] = {}
        self.blocked = 0
        self.tail = 0

    @property
    def loose(self) -> int:
        """Slots of this node that could be evicted now."""
        return 0 if self.blocked else self.tail

    @property
    def whole(self) -> bool:
        """Whether the node could be evicted with all below it."""
        return not self.blocked and self.tail == len(self.slots)


class _Root(_Node):
    """The empty node above everything in a namespace."""

    __slots__ = ("namespace",)

    def __init__(self, namespace: Hashable) -> None:
        super().__init__(_NOBODY, None, _NONE, _NONE)
        self.namespace = namespace


class RadixCache:
    """Cached prefixes of token sequences, per namespace.

    A namespace is whatever makes K and V of equal tokens differ: the model, the adapter's version, a mode that alters K and V, a salt.

    Args:
        pool: where the slots live; the cache follows its reference counts.
    """

    def __init__(self, pool: SlotPool) -> None:
        self._pool = pool
        self._owner = np.full(pool.size, _NOBODY, np.int64)  # slot -> number of the node that owns it
        self._nodes: dict[int, _Node] = {}
        self._roots: dict[Hashable, _Root] = {}
        self._recent: OrderedDict[int, _Node] = OrderedDict()  # oldest first; a child always stands before its parent
        self._next = 0
        self._size = 0
        self._evictable = 0
        pool.watch(self._on_references)

    @property
    def size(self) -> int:
        """Slots held by the cache."""
        return self._size

    @property
    def evictable(self) -> int:
        """Slots that :meth:`evict` could free now."""
        return self._evictable

    def match(self, namespace: Hashable, tokens: ArrayLike) -> Ints:
        """Take the longest cached prefix of ``tokens``.

        The prefix's slots are shared on the caller's behalf in the same call, so nothing can evict them in between: the
        caller owns one reference to each and gives it back with ``pool.release``.

        Args:
            namespace: where to look.
            tokens: int32[n].

        Returns:
            int32[m] slots of the first m <= n tokens.
        """
        wanted = _row(tokens, "tokens")
        path, parts, _ = self._walk(namespace, wanted)
        self._touch(path)
        slots = np.concatenate(parts) if parts else _NONE.copy()
        self._pool.share(slots)
        return slots

    def insert(self, namespace: Hashable, tokens: ArrayLike, slots: ArrayLike) -> int:
        """Cache ``tokens`` under ``slots``.

        Where a prefix is cached already its slots stay and the given ones are ignored; for the rest the cache adds a
        reference of its own to each given slot. The caller's references are untouched either way.

        Args:
            namespace: where to put it.
            tokens: int32[n].
            slots: int32[n], in use, one per token.

        Returns:
            How many slots the cache took.

        Raises:
            ValueError: when a slot to be taken is free, doubled, or cached already elsewhere.
        """
        run, held = _row(tokens, "tokens"), _row(slots, "slots")
        if len(run) != len(held):
            raise ValueError(f"insert: {len(run)} tokens but {len(held)} slots")
        path, parts, inside = self._walk(namespace, run)
        at = sum(len(part) for part in parts)
        if at == len(run):
            self._touch(path)
            return 0
        new = held[at:].copy()
        if len(new) and self._pool.refs(new).min() < 1:
            raise ValueError("insert: a slot is free; only slots in use can be cached")
        if len(new) and (self._owner[new] != _NOBODY).any():
            raise ValueError("insert: a slot is cached already under other tokens")
        self._pool.share(new)
        if inside is not None:
            path[-1] = self._split(path[-1], inside)
        parent = path[-1] if path else self._root(namespace)
        path.append(self._add(parent, run[at:].copy(), new))
        self._touch(path)
        return len(new)

    def evict(self, n: int) -> int:
        """Free up to ``n`` slots, those of the least recently used leaves first.

        A leaf of which fewer are needed loses its end. Slots that anybody else references stay.

        Returns:
            How many were freed; fewer than ``n`` only when there was no more to evict.
        """
        freed: list[Ints] = []
        gone: list[int] = []
        left = min(n, self._evictable)
        for node in self._recent.values():
            if left <= 0:
                break
            count = min(left, node.loose) if not node.children else 0
            if not count:
                continue
            left -= count
            freed.append(self._trim(node, count))
            if not len(node.slots):
                gone.append(node.number)
        for number in gone:
            del self._recent[number]
        total = sum(len(part) for part in freed)
        if total:
            self._pool.release(np.concatenate(freed))
        return total

    def clear(self) -> None:
        """Forget everything; slots that sequences still reference stay theirs."""
        held = np.concatenate([_NONE, *(node.slots for node in self._nodes.values())])
        self._owner[held] = _NOBODY
        self._nodes.clear()
        self._roots.clear()
        self._recent.clear()
        self._size = self._evictable = 0
        self._pool.release(held)

    def _walk(self, namespace: Hashable, tokens: Ints) -> tuple[list[_Node], list[Ints], int | None]:
        """Follow ``tokens`` down.

        Returns:
            The nodes below the root, the matched slots of each, and how far the match goes into the last node (None: to its end).
        """
        path: list[_Node] = []
        parts: list[Ints] = []
        node: _Node | None = self._roots.get(namespace)
        at = 0
        while node is not None and at < len(tokens):
            node = node.children.get(int(tokens[at]))
            if node is None:
                break
            common = _common(node.tokens, tokens[at:])
            path.append(node)
            parts.append(node.slots[:common])
            if common < len(node.tokens):
                return path, parts, common
            at += common
        return path, parts, None

    def _touch(self, path: list[_Node]) -> None:
        for node in reversed(path):
            self._recent.move_to_end(node.number)

    def _root(self, namespace: Hashable) -> _Node:
        if namespace not in self._roots:
            self._roots[namespace] = _Root(namespace)
        return self._roots[namespace]

    def _new(self, parent: _Node, tokens: Ints, slots: Ints) -> _Node:
        node = _Node(self._next, parent, tokens, slots)
        self._next += 1
        self._nodes[node.number] = self._recent[node.number] = node
        self._owner[slots] = node.number
        parent.children[int(tokens[0])] = node
        return node

    def _add(self, parent: _Node, tokens: Ints, slots: Ints) -> _Node:
        """A new leaf."""
        node = self._new(parent, tokens, slots)
        self._size += len(slots)
        self._block(parent, 1)  # its tail counts as held until measured
        self._measure(node)
        return node

    def _split(self, node: _Node, at: int) -> _Node:
        """Cut ``node`` before its token ``at``; returns the new upper part. What can be evicted stays the same."""
        assert node.parent is not None
        upper = self._new(node.parent, node.tokens[:at].copy(), node.slots[:at].copy())
        node.tokens, node.slots, node.parent = node.tokens[at:].copy(), node.slots[at:].copy(), upper
        upper.children[int(node.tokens[0])] = node
        upper.tail = self._unshared(upper.slots)  # more than node.tail tells, where a slot in between is held
        node.tail = min(node.tail, len(node.slots))
        upper.blocked = 0 if node.whole else 1
        return upper

    def _trim(self, node: _Node, count: int) -> Ints:
        """Cut the last ``count`` slots off a leaf, and the leaf off the tree when none is left; returns them unreleased."""
        keep = len(node.slots) - count
        cut, first = node.slots[keep:], int(node.tokens[0])
        node.tokens, node.slots = node.tokens[:keep].copy(), node.slots[:keep].copy()
        node.tail -= count
        self._owner[cut] = _NOBODY
        self._size -= count
        self._evictable -= count
        if not keep:
            parent = node.parent
            assert parent is not None
            del parent.children[first], self._nodes[node.number]
            if isinstance(parent, _Root) and not parent.children:
                del self._roots[parent.namespace]
        return cut

    def _block(self, node: _Node | None, change: int) -> None:
        """``change`` more children of ``node`` cannot be evicted whole; tell upwards as far as that matters."""
        while node is not None:
            loose, whole = node.loose, node.whole
            node.blocked += change
            self._evictable += node.loose - loose
            if node.whole == whole:
                return
            node = node.parent

    def _measure(self, node: _Node) -> None:
        """Bring ``node.tail`` and all that follows from it up to date with the pool."""
        loose, whole = node.loose, node.whole
        node.tail = self._unshared(node.slots)
        self._evictable += node.loose - loose
        if node.whole != whole:
            self._block(node.parent, 1 if whole else -1)

    def _unshared(self, slots: Ints) -> int:
        """How many slots at the end of a run only the tree references."""
        others = np.flatnonzero(self._pool.refs(slots) > 1)
        return len(slots) - (int(others[-1]) + 1 if len(others) else 0)

    def _on_references(self, slots: Ints) -> None:
        numbers = self._owner[slots]
        numbers = numbers[numbers != _NOBODY]
        if len(numbers):
            for number in np.unique(numbers).tolist():
                self._measure(self._nodes[number])


def _row(values: ArrayLike, name: str) -> Ints:
    array = np.asarray(values, dtype=np.int32)
    if array.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional, not {array.shape}")
    return array


def _common(a: Ints, b: Ints) -> int:
    """Length of the common prefix of two runs."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n
