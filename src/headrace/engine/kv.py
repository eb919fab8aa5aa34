"""Who holds which slots: allocation, prefix reuse, publishing and release for sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headrace.engine.sequence import Sequence
from headrace.models.cache.radix import RadixCache
from headrace.models.cache.slots import SlotPool

if TYPE_CHECKING:
    from headrace.core.batch import Ints


class KVSpace:
    """The slot pool and, unless switched off, the radix cache of prefixes over it.

    A sequence holds one reference on each slot of its table and the radix tree one on each slot it keeps, so a slot
    is free exactly when nobody needs it.
    """

    def __init__(self, pool: SlotPool, *, prefix_cache: bool = True) -> None:
        self.pool = pool
        self.radix = RadixCache(pool) if prefix_cache else None

    @property
    def available(self) -> int:
        """Slots that are free or can be freed by forgetting cached prefixes."""
        return self.pool.free + (self.radix.evictable if self.radix else 0)

    @property
    def cached(self) -> int:
        """Slots the radix tree keeps."""
        return self.radix.size if self.radix else 0

    def attach(self, sequence: Sequence) -> int:
        """Give a sequence without slots the longest cached prefix; returns its length in tokens.

        The last known token is always left to compute, because its logits are wanted.
        """
        if self.radix is None or sequence.length < 2:
            return 0
        found = self.radix.match(sequence.request.cache_salt, sequence.tokens[: sequence.length - 1])
        sequence.hold(found)
        sequence.context = len(found)
        return len(found)

    def reserve(self, count: int) -> Ints | None:
        """``count`` slots with one reference each, forgetting cached prefixes as needed; None when there are too few."""
        short = count - self.pool.free
        if short > 0 and self.radix is not None:
            self.radix.evict(short)
        return self.pool.take(count) if self.pool.free >= count else None

    def publish(self, sequence: Sequence) -> None:
        """Let other requests find the K and V of a sequence's computed tokens, those that retrieval made approximate excepted."""
        if self.radix is not None and sequence.exact:
            held = sequence.exact
            self.radix.insert(sequence.request.cache_salt, sequence.tokens[:held], sequence.slots[:held])

    def fork(self, parent: Sequence, twin: Sequence) -> None:
        """Share the slots of ``parent``'s context with ``twin``, whose table already lists them."""
        self.pool.share(parent.slots[: twin.context])

    def release(self, sequence: Sequence) -> None:
        """Give back everything a sequence holds."""
        if sequence.context:
            self.pool.release(sequence.slots[: sequence.context])
            sequence.context = 0
