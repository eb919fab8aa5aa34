"""Sparse attention inside the engine: what a :class:`headrace.models.attention.retrieving.Retriever` does with sketches.

A sequence gets sketches, one a layer, at its first decode step over a context that is long enough. Where its slots have codes
already, because they come from a cached prefix, it takes these over with their codebooks and clusters nothing. K and V stay
where they are, in the pool's planes; prompts, chunks and short contexts attend as ever.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headrace.core.batch import Batch, Retrieving
from headrace.core.retrieval import Retrieval
from headrace.models.cache.planes import Planes, Scales
from headrace.models.cache.slots import Ints, SlotPool
from headrace.sparse.books import Edition, Shelf
from headrace.sparse.codebook import SAMPLE, Codes, fit
from headrace.sparse.regions import Regions
from headrace.sparse.sketch import Book, Question, Rows, Searcher, Sketch

WRITE_EVERY = 64
"""Items that may be coded before their codes go to the shelf."""


@dataclass(frozen=True, slots=True)
class ServingSettings:
    """How sequences are searched; ``refresh`` and ``residual`` as in :class:`headrace.sparse.layer.PQSettings`."""

    codes: Codes = field(default_factory=lambda: Codes(4, 8))
    iterations: int = 4
    initial: int = 32
    refresh: float | None = 0.25
    residual: bool = True


@dataclass(slots=True)
class _Held:
    """A sequence's sketches, one a layer, and those that a refresh has made so far; with residual correction, sums of values."""

    regions: Regions
    prompt: int
    edition: Edition
    sketches: list[Sketch]
    written: int = 0
    fresh: list[Sketch] = field(default_factory=list)
    sums: list[Tensor] | None = None


@dataclass(slots=True)
class _Taken:
    """A segment of the step: its sequence's sketches, rows in the batch, own slots, mask, context slots and regions' borders."""

    held: _Held
    rows: slice
    own: Tensor
    mask: Tensor | None
    slots: Tensor
    local: int
    most: int


class SlotRetriever:
    """Retrieves from K and V in a slot pool, on the CPU.

    Args:
        pool: where K and V live; gets planes of codes.
        depth, heads, size: layers, K/V heads and their dimensions.
        settings: how to search.

    Raises:
        InvalidRequest: when the sub-spaces do not divide the head size.
    """

    def __init__(
        self, pool: SlotPool, depth: int, heads: int, size: int, settings: ServingSettings | None = None
    ) -> None:
        self.settings = settings or ServingSettings()
        self.shelf = Shelf(pool, depth, heads, self.settings.codes)
        self._depth, self._heads, self._size = depth, heads, size
        self._held: dict[int, _Held] = {}
        self._searcher = Searcher()
        self._taken: list[_Taken] = []

    def __len__(self) -> int:
        """Sequences with sketches."""
        return len(self._held)

    @property
    def nbytes(self) -> int:
        """Bytes of all sketches and of the codebooks behind them."""
        books = {id(s.book): s.book.nbytes for held in self._held.values() for s in held.sketches}
        return sum(s.nbytes for held in self._held.values() for s in held.sketches) + sum(books.values())

    def begin(self, batch: Batch, planes: Planes) -> NDArray[np.bool_] | None:
        """As the protocol says."""
        self._taken = []
        taken = np.zeros(batch.segments, np.bool_)
        for wish in batch.retrieving:
            found = self._take(batch, planes, wish)
            if found is not None:
                self._taken.append(found)
                taken[wish.segment] = True
        return taken if self._taken else None

    def attend(
        self, layer: int, q: Tensor, keys: Tensor, values: Tensor, out: Tensor, scale: float, scales: Scales | None
    ) -> None:
        """As the protocol says."""
        initial, results, questions = self.settings.initial, [], []
        for taken in self._taken:
            asked = q[taken.rows].float().contiguous()
            results.append(torch.empty_like(asked))
            rows = self._rows(keys, values, taken.slots, scales)
            questions.append(
                Question(
                    taken.held.sketches[layer], rows, asked, len(taken.slots), initial, taken.local, taken.most,
                    taken.most, scale, own=taken.own, mask=taken.mask,
                    value_sum=None if taken.held.sums is None else taken.held.sums[layer],
                )
            )  # fmt: skip
        self._searcher.attend(questions, results)
        for taken, result in zip(self._taken, results, strict=True):
            out[taken.rows] = result

    def forget(self, sequence: int) -> None:
        """Let go of a sequence's sketches; the codes of slots that others may find stay on the shelf."""
        self._held.pop(sequence, None)

    def _take(self, batch: Batch, planes: Planes, wish: Retrieving) -> _Taken | None:
        """Make a segment ready; None where it is better read whole."""
        s = wish.segment
        slots = batch.context_slots[batch.context_starts[s] : batch.context_starts[s + 1]]
        held = self._held.get(wish.sequence)
        if held is None:
            held = self._start(wish.kv, slots, planes)
            if held is None:
                return None
            self._held[wish.sequence] = held
        window = held.regions.window(held.prompt, len(slots))
        items = len(slots) - window.local - window.initial
        if items <= window.retrieved:
            return None
        self._keep(held, slots)
        self._refresh(held, slots, items, planes)
        first, last = int(batch.query_starts[s]), int(batch.query_starts[s + 1])
        words = batch.mask_words[batch.mask_starts[s] : batch.mask_starts[s + 1]]
        return _Taken(
            held,
            slice(first, last),
            torch.from_numpy(batch.write_slots[first:last]),
            torch.from_numpy(words) if len(words) else None,
            torch.from_numpy(slots),
            window.initial + items,
            window.retrieved,
        )

    def _start(self, kv: Retrieval, slots: Ints, planes: Planes) -> _Held | None:
        """Sketches for a new sequence, from the shelf as far as it has codes of its slots; None for a context too short."""
        settings = self.settings
        regions = Regions(kv.budget, settings.initial)
        window = regions.window(len(slots), len(slots))
        items = len(slots) - window.local - window.initial
        if items <= max(window.retrieved, settings.codes.centroids):
            return None
        inner = slots[window.initial : window.initial + items]
        edition, known = self.shelf.find(inner)
        if edition is None or self._outgrown(edition, items):
            edition, known = self._fit(slots, items, planes), 0
        sketches = []
        for layer, book in enumerate(edition.books):
            sketch = Sketch(settings.codes, book)
            if known:
                sketch.put(self.shelf.read(layer, inner[:known]))
            if known < items:
                sketch.code(self._rows_of(planes, layer, slots), settings.initial, items)
            sketches.append(sketch)
        held = _Held(regions, len(slots), edition, sketches, known)
        if settings.residual:
            held.sums = [self._sum(layer, inner, planes) for layer in range(self._depth)]
        self._keep(held, slots)
        return held

    def _fit(self, slots: Ints, items: int, planes: Planes) -> Edition:
        return self.shelf.publish([self._fit_layer(layer, slots, items, planes) for layer in range(self._depth)], items)

    def _fit_layer(self, layer: int, slots: Ints, items: int, planes: Planes) -> Book:
        """Cluster evenly spaced items' keys."""
        settings = self.settings
        stride = max(1, items // (SAMPLE * settings.codes.centroids))
        chosen = torch.from_numpy(slots[settings.initial : settings.initial + items : stride]).long()
        keys = planes.keys[layer][chosen].float()
        if planes.scales is not None:
            keys *= planes.scales[layer][0][chosen][..., None]
        return Book(fit(keys.transpose(0, 1), settings.codes, iterations=settings.iterations))

    def _sum(self, layer: int, slots: Ints, planes: Planes) -> Tensor:
        """Sum of the values in ``slots``: float32[Hkv, D]."""
        at = torch.from_numpy(slots).long()
        values = planes.values[layer][at].float()
        if planes.scales is not None:
            values *= planes.scales[layer][1][at][..., None]
        return values.sum(0)

    def _outgrown(self, edition: Edition, items: int) -> bool:
        refresh = self.settings.refresh
        return refresh is not None and items > edition.fitted * (1.0 + refresh)

    def _refresh(self, held: _Held, slots: Ints, items: int, planes: Planes) -> None:
        """Fit outgrown codebooks anew, a layer a step, so that no step waits for all; the last layer puts the new ones into use."""
        if not self._outgrown(held.edition, items):
            return
        layer = len(held.fresh)
        sketch = Sketch(self.settings.codes, self._fit_layer(layer, slots, items, planes))
        sketch.code(self._rows_of(planes, layer, slots), self.settings.initial, items)
        held.fresh.append(sketch)
        if len(held.fresh) == self._depth:
            for layer, (new, old) in enumerate(zip(held.fresh, held.sketches, strict=True)):
                if new.length < old.length:  # both stand where the sums of values do
                    new.code(self._rows_of(planes, layer, slots), self.settings.initial, old.length)
                new.truncate(old.length)
            held.edition = self.shelf.publish([sketch.book for sketch in held.fresh], items)
            held.sketches, held.fresh, held.written = held.fresh, [], 0

    def _keep(self, held: _Held, slots: Ints) -> None:
        """Put codes on the shelf that are not there yet, once there are enough of them."""
        coded = min(sketch.length for sketch in held.sketches)
        if coded - held.written < WRITE_EVERY:
            return
        initial, first = self.settings.initial, held.written
        codes = [sketch.part(first, coded) for sketch in held.sketches]
        self.shelf.write(held.edition, slots[initial + first : initial + coded], codes)
        held.written = coded

    def _rows_of(self, planes: Planes, layer: int, slots: Ints) -> Rows:
        scales = None if planes.scales is None else planes.scales[layer]
        return self._rows(planes.keys[layer], planes.values[layer], torch.from_numpy(slots), scales)

    def _rows(self, keys: Tensor, values: Tensor, slots: Tensor, scales: Scales | None) -> Rows:
        return Rows(keys, values, self._heads * self._size, self._size, self._heads, self._size, slots, scales)
