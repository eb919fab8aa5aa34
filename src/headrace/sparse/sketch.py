"""A sketch of one sequence's middle keys in one layer, held for the native kernels: codes, their order, and attention through them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.native import sketch as native
from headrace.sparse.codebook import Codebook, Codes

CELL_BITS = 14
"""Codes of up to this many bits are kept as joint cells, longer ones scanned."""

TAIL = 256
"""Coded keys that wait before they are sorted in."""

LANES = 16

GROWTH = 32
"""A sketch that is full grows by one part in so many: copying is cheap, and memory is what a sketch shall save."""


def usable(codes: Codes, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the native kernels take such codes, of keys of such a dtype, here."""
    from headrace.native import build

    return device.type == "cpu" and dtype in native.STORAGES and codes.bits <= 8 and build.available()


class Book:
    """Centroids as the kernels read them: turned, so that one dimension of all centroids lies together.

    Args:
        codebook: of H heads, [H, m, C, D / m].
    """

    def __init__(self, codebook: Codebook) -> None:
        centroids = codebook.centroids.float()
        heads, subspaces, count, run = centroids.shape
        self.width = -(-count // LANES) * LANES
        self.turned = torch.zeros(heads, subspaces, run, self.width)
        self.turned[..., :count] = centroids.transpose(2, 3)
        self.half = torch.full((heads, subspaces, self.width), torch.inf)
        self.half[..., :count] = centroids.square().sum(-1) / 2

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return self.turned.nbytes + self.half.nbytes


@dataclass(slots=True)
class Rows:
    """K and V of one sequence in one layer.

    Attributes:
        keys, values: planes that the rows lie in, of equal strides; the first element is that of row 0, head 0.
        token_stride, head_stride: elements between rows, and between heads.
        heads, size: K/V heads and their dimensions.
        slots: int32[tokens], the row of each token; None where token t is row t.
        scales: float32[rows, heads] of int8 K and V.
    """

    keys: Tensor
    values: Tensor
    token_stride: int
    head_stride: int
    heads: int
    size: int
    slots: Tensor | None = None
    scales: tuple[Tensor, Tensor] | None = None

    def struct(self, before: int = 0) -> native.Context:
        """For a kernel that numbers tokens from ``before`` below row 0 on."""
        back = before * self.token_stride * self.keys.element_size()
        return native.Context(
            self.keys.data_ptr() - back,
            self.values.data_ptr() - back,
            None if self.scales is None else self.scales[0].data_ptr(),
            None if self.scales is None else self.scales[1].data_ptr(),
            None if self.slots is None else self.slots.data_ptr(),
            self.token_stride,
            self.head_stride,
            native.STORAGES[self.keys.dtype],
            self.heads,
            self.size,
        )


class Sketch:
    """Codes of items 0, 1, ... (middle tokens, oldest first) of H heads.

    Args:
        codes: sub-spaces and bits, at most 8.
        book: what to code with.
        skip: items at the start that are padding: never chosen.

    Attributes:
        length: items coded.
    """

    def __init__(self, codes: Codes, book: Book, skip: int = 0) -> None:
        self.codes, self.book, self.skip = codes, book, skip
        self.heads = len(book.turned)
        self.joint = codes.bits * codes.subspaces <= CELL_BITS
        self.length = self.sorted = 0
        self._capacity = 0
        self._codes = self._cells = self._order = torch.empty(0)
        self.struct = native.Sketch(
            centroids=book.turned.data_ptr(), half=book.half.data_ptr(), subspaces=codes.subspaces, bits=codes.bits,
            width=book.width, skip=skip,
        )  # fmt: skip
        if self.joint:
            self._lists = torch.zeros(3, self.heads, codes.cells, dtype=torch.int32)
            self.struct.starts, self.struct.ends, self.struct.counts = (part.data_ptr() for part in self._lists)

    @property
    def nbytes(self) -> int:
        """Bytes of codes in use, and of the lists that sort them; the book's not among them."""
        if not self.joint:
            return self.heads * self.codes.subspaces * self.length
        return self.heads * self.length * (2 + 4) + self._lists.nbytes

    @property
    def allocated(self) -> int:
        """Bytes held, room to grow among them; the book's not."""
        lists = self._lists.nbytes if self.joint else 0
        return self._codes.nbytes + self._cells.nbytes + self._order.nbytes + lists

    @property
    def table(self) -> Tensor:
        """The codes uint8[H, m, length]."""
        return self.part(0, self.length)

    def part(self, first: int, last: int) -> Tensor:
        """The codes of items [first, last): uint8[H, m, last - first]."""
        if not self.joint:
            return self._codes[:, :, first:last]
        cells = self._cells[:, first:last].to(torch.int32)
        mask = (1 << self.codes.bits) - 1
        return torch.stack([cells >> self.codes.bits * m & mask for m in range(self.codes.subspaces)], 1).to(
            torch.uint8
        )

    def put(self, table: Tensor) -> None:
        """Begin anew with codes uint8[H, m, n] that were computed before, by the same book."""
        self.length = self.sorted = 0
        self.reserve(table.shape[2])
        if self.joint:
            shifts = torch.arange(self.codes.subspaces, dtype=torch.int32)[None, :, None] * self.codes.bits
            self._cells[:, : table.shape[2]] = (table.to(torch.int32) << shifts).sum(1).to(torch.uint16)
        else:
            self._codes[:, :, : table.shape[2]] = table
        self.length = table.shape[2]
        self._sort()

    def code(self, rows: Rows, initial: int, upto: int) -> None:
        """Code items up to ``upto``, token ``initial`` + i of ``rows`` each."""
        self.reserve(upto)
        native.code(self.struct, rows.struct(), initial, self.length, upto, sort=False)
        self.length = upto
        self._sort()

    def append(self, keys: Tensor) -> None:
        """Code further ``keys`` [H, n, D]."""
        if keys.dtype not in native.STORAGES or keys.dtype is torch.int8 or keys.stride(2) != 1:
            keys = keys.float().contiguous()
        _, count, size = keys.shape
        rows = Rows(keys, keys, keys.stride(1), keys.stride(0), self.heads, size)
        self.reserve(self.length + count)
        native.code(
            self.struct, rows.struct(before=self.length), 0, self.length, self.length + count, sort=False
        )  # fmt: skip
        self.length += count
        self._sort()

    def truncate(self, length: int) -> None:
        """Forget all but the first ``length`` items."""
        if length >= self.length:
            return
        dropped, self.length = slice(max(length, self.skip), self.length), length
        if self.joint and length >= self.sorted:
            gone = self._cells[:, dropped].to(torch.int64)
            self._lists[2].scatter_add_(1, gone, torch.full(gone.shape, -1, dtype=torch.int32))
            self.struct.length = length
        else:
            self._sort()

    def reserve(self, items: int) -> None:
        """Make room."""
        if items <= self._capacity:
            return
        self._capacity = max(items, self._capacity + self._capacity // GROWTH, 64)
        held, runs = self.length, self.codes.subspaces
        if self.joint:
            cells = torch.empty(self.heads, self._capacity, dtype=torch.uint16)
            order = torch.empty(self.heads, self._capacity, dtype=torch.int32)
            if held:
                cells[:, :held], order[:, :held] = self._cells[:, :held], self._order[:, :held]
            self._cells, self._order = cells, order
            self.struct.cells, self.struct.order = cells.data_ptr(), order.data_ptr()
        else:
            codes = torch.empty(self.heads, runs, self._capacity, dtype=torch.uint8)
            if held:
                codes[:, :, :held] = self._codes[:, :, :held]
            self._codes = codes
            self.struct.codes = codes.data_ptr()
        self.struct.capacity = self._capacity

    def _sort(self) -> None:
        self.struct.length = self.length
        if self.joint:
            native.sort_items(self.struct, self.heads, self.length)
        self.sorted = self.struct.sorted = self.length

    def advance(self, items: int) -> tuple[int, bool]:
        """Make ready for a kernel that codes up to ``items`` itself: how many are new, and whether it should sort."""
        self.reserve(items)
        return items - self.length, self.joint and items - self.sorted > TAIL

    def advanced(self, items: int, resorted: bool) -> None:
        """Note that a kernel has done so."""
        self.length = self.struct.length = items
        if resorted:
            self.sorted = self.struct.sorted = items


@dataclass(slots=True)
class Question:
    """What a sequence asks of one layer.

    Attributes:
        sketch, rows: where to search, and where K and V lie.
        queries: float32[n, H * G, D], contiguous; one row for a decode step, several for a draft tree.
        length: tokens of the context; a decode step over its own cache counts the newest among them.
        initial, local: tokens [0, initial) and [local, length) are always attended to; those between are items.
        least, most: items to retrieve, ``most`` unless ``keep`` is reached before.
        keep: share of the middle's estimated attention that is enough; 0 for none.
        scale: factor on the scores.
        value_sum: float32[H, D] of the items' values, kept up to date, for residual correction; None for none.
        own: int32[n], the slots of the queries' own rows, where these are no part of the context; None where they are.
        mask: int32[n, ceil(n / 32)], which of its own rows each query sees; None for those before and itself.
    """

    sketch: Sketch
    rows: Rows
    queries: Tensor
    length: int
    initial: int
    local: int
    least: int
    most: int
    scale: float
    keep: float = 0.0
    value_sum: Tensor | None = None
    own: Tensor | None = None
    mask: Tensor | None = None


class Searcher:
    """Answers questions; it keeps scratch memory, and belongs to one thread at a time."""

    def __init__(self) -> None:
        self._chosen = torch.empty(0, dtype=torch.int32)
        self._found = torch.empty(0, dtype=torch.int32)
        self._logs = torch.empty(0)

    def attend(self, questions: Sequence[Question], out: Sequence[Tensor]) -> None:
        """Code what has left the local windows, search, and write attention into ``out``, float32[n, H * G, D] each, contiguous."""
        structs = self._structs(questions)
        resorts = []
        for struct, question, to in zip(structs, questions, out, strict=True):
            struct.out = to.data_ptr()
            items = question.local - question.initial
            fresh, resort = question.sketch.advance(items)
            struct.fresh, struct.resort = fresh, resort
            resorts.append((question.sketch, items, resort))
        native.attend(structs)
        for sketch, items, resort in resorts:
            sketch.advanced(items, resort)

    def select(self, question: Question) -> list[Tensor]:
        """The items that a search finds, by head: int32[found] each, in no order."""
        structs = self._structs([question])
        native.search(structs[0])
        heads, most = question.sketch.heads, question.initial + question.most + question.length - question.local
        room = self._chosen[: heads * most].view(heads, most)
        return [row[:count] for row, count in zip(room, self._found[:heads].tolist(), strict=True)]

    def _structs(self, questions: Sequence[Question]) -> ctypes.Array[native.Query]:
        rooms = [q.initial + q.most + q.length - q.local for q in questions]
        heads = [q.sketch.heads for q in questions]
        asked = [q.queries.shape[0] * q.queries.shape[1] for q in questions]
        self._chosen = _hold(self._chosen, sum(h * room for h, room in zip(heads, rooms, strict=True)))
        self._found, self._logs = _hold(self._found, sum(heads)), _hold(self._logs, sum(asked))
        chosen, found, logs = self._chosen.data_ptr(), self._found.data_ptr(), self._logs.data_ptr()
        structs = (native.Query * len(questions))()
        self._contexts = [q.rows.struct() for q in questions]
        for struct, q, context, room, count, products in zip(
            structs, questions, self._contexts, rooms, heads, asked, strict=True
        ):
            struct.context, struct.sketch = ctypes.addressof(context), ctypes.addressof(q.sketch.struct)
            struct.queries = q.queries.data_ptr()
            struct.rows, struct.group = q.queries.shape[0], q.queries.shape[1] // count
            struct.length, struct.initial, struct.local = q.length, q.initial, q.local
            struct.least, struct.most, struct.keep, struct.scale = q.least, q.most, q.keep, q.scale
            struct.value_sum = None if q.value_sum is None else q.value_sum.data_ptr()
            struct.own = None if q.own is None else q.own.data_ptr()
            struct.mask = None if q.mask is None else q.mask.data_ptr()
            struct.chosen, struct.found, struct.logs = chosen, found, logs
            chosen, found, logs = chosen + 4 * count * room, found + 4 * count, logs + 4 * products
        return structs


def _hold(room: Tensor, size: int) -> Tensor:
    """``room`` where it is of at least ``size``, else a larger one."""
    return room if len(room) >= size else torch.empty(size + size // 2, dtype=room.dtype)
