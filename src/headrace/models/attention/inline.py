"""The CPU kernel's argument blocks for all layers of a step, so that native code can attend in the middle of its own threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from headrace.core.batch import Batch
from headrace.models.attention import cpu, dense
from headrace.models.attention.interface import check_window
from headrace.models.attention.tiles import NO_WINDOW, PACKED, PART, scratch_size
from headrace.models.attention.worker import FIELDS


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """How a layer attends: query heads, factor on the scores, window, soft cap and sinks (float32[Hq]), as for ``attend``."""

    query_heads: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether long chunks can be left to torch."""
        return self.softcap is None and self.sinks is None


@dataclass(slots=True)
class Prepared:
    """What :meth:`InlineAttention.begin` found out.

    Attributes:
        farthest: highest position in the batch.
        ids, positions, writes, wanted: addresses of the batch's arrays.
        left: per layer the chunks that its worker leaves out, for :meth:`InlineAttention.finish`; layers without any are missing.
    """

    farthest: int
    ids: int
    positions: int
    writes: int
    wanted: int
    left: dict[int, list[dense.Chunk]]


class InlineAttention:
    """Argument blocks of layers over given planes.

    Args:
        layers: how each attends.
        keys, values: their planes [slots, Hkv, D], contiguous.
        scales: of int8 planes, float32[slots, Hkv] each.

    Attributes:
        worker: address of the C function that every thread of a team calls with a layer's block.

    Raises:
        ValueError: for planes that the kernel does not read.
    """

    def __init__(
        self,
        layers: Sequence[LayerAttention],
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        scales: Sequence[tuple[Tensor, Tensor]] | None,
    ) -> None:
        self._planes, self._layers = (keys, values, scales), layers
        self._slots, self._heads, self._size = keys[0].shape
        self.worker: int = cpu.compiled(_storage(keys, values)).address
        self._prepare = cpu.compiled("prepare")
        depth = len(layers)
        self._blocks = np.zeros((depth, FIELDS), np.int64)
        self._counters = np.zeros((depth, 2), np.int64)
        self._numbers = np.array([(layer.scale, layer.softcap or 0.0) for layer in layers], np.float32)
        self._sinks = [None if i.sinks is None else i.sinks.detach().float().contiguous() for i in layers]
        self._cut_alike()
        for index in range(depth):
            self._fix(index)
        self._partial, self._done, self._scratch = cpu.Room(np.float32), cpu.Room(np.int64), cpu.Room(np.float32)
        self._hold(256, 256, 64)
        self._hold_parts(0)

    def address(self, layer: int) -> int:
        """Of the layer's block; it never changes."""
        return int(self._blocks.ctypes.data) + layer * self._blocks.strides[0]

    def between(self, queries: Tensor, out: Tensor, threads: int) -> None:
        """Say where the workers read queries and write results, and how many threads will call them.

        Args:
            queries, out: float32[at least N * Hq * D], which stay where they are until the next call.
        """
        self._blocks[:, 1], self._blocks[:, 4] = queries.data_ptr(), out.data_ptr()
        group = max(layer.query_heads for layer in self._layers) // self._heads
        self._blocks[:, 30] = self._scratch.hold(threads * scratch_size(group, self._size, self._size))
        self._queries, self._out = queries, out

    def begin(self, batch: Batch) -> Prepared:
        """Make all blocks ready for a step.

        Raises:
            ValueError: when the batch reads slots that the planes do not have.
        """
        rows, held = len(batch.write_slots), len(batch.context_slots)
        segments = len(batch.query_starts) - 1
        tiles = rows + (rows + held) // PART
        if rows + held > len(self._keys) or tiles > self._tiles.shape[1] or segments > self._skips.shape[1]:
            self._hold(rows + held, tiles, segments)
        if rows + held > PART:
            self._hold_parts(2 * ((rows + held) // PART))
        dense_rows = self._choose_dense(batch) if batch.shape.prefill_tokens >= dense.ROWS else False
        low, high, farthest, ids, positions, writes, wanted = self._prepare(
            batch.ids, batch.positions, batch.write_slots, batch.query_starts, batch.context_starts, batch.context_slots,
            batch.mask_starts, batch.mask_words, batch.head_rows,
            self._kinds, self._skips, self._kind_of, self._blocks, self._counters, self._keys, self._tiles,
        )  # fmt: skip
        if low < 0 or high >= self._slots:
            raise ValueError(f"slots from {low} to {high} in the batch; the planes have {self._slots}, from 0 on")
        left = self._chunks(batch) if dense_rows else {}
        return Prepared(farthest, ids, positions, writes, wanted, left)

    def views(
        self, layer: int, rows: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, float, tuple[Tensor, Tensor] | None]:
        """Of a layer whose worker has run: queries [rows, Hq, D], its planes, results [rows, Hq, D], scale, and the planes' scales."""
        keys, values, scales = self._planes
        shape = (rows, self._layers[layer].query_heads, self._size)
        queries, out = (part[: shape[0] * shape[1] * shape[2]].view(shape) for part in (self._queries, self._out))
        return (
            queries,
            keys[layer],
            values[layer],
            out,
            self._layers[layer].scale,
            None if scales is None else scales[layer],
        )

    def finish(self, layer: int, chunks: list[dense.Chunk]) -> None:
        """Attend to the rows that the layer's worker left out."""
        keys, values, scales = self._planes
        shape = (-1, self._layers[layer].query_heads, self._size)
        for chunk in chunks:
            upto = chunk.rows.stop * shape[1] * shape[2]
            queries, out = (part[:upto].view(shape) for part in (self._queries, self._out))
            scale = self._layers[layer].scale
            dense.attend(
                queries, keys[layer], values[layer], out, chunk, scale, None if scales is None else scales[layer]
            )

    def _choose_dense(self, batch: Batch) -> bool:
        """Mark the segments that are left to torch, where there are any."""
        segments = batch.segments
        for number, (_, window) in enumerate(self._kinds.tolist()):
            plain = self._plain[number]
            self._skips[number, :segments] = plain & dense.is_dense(batch, None if window == NO_WINDOW else window)
        return bool(self._skips[:, :segments].any())

    def _chunks(self, batch: Batch) -> dict[int, list[dense.Chunk]]:
        made = [
            dense.chunks(batch, self._skips[number, : batch.segments], None if window == NO_WINDOW else window)
            for number, (_, window) in enumerate(self._kinds.tolist())
        ]
        self._skips.fill(False)
        return {layer: made[kind] for layer, kind in enumerate(self._kind_of.tolist()) if made[kind]}

    def _cut_alike(self) -> None:
        """Group the layers whose work is cut into the same tiles."""
        kinds: dict[tuple[int, int, bool], int] = {}
        numbers = []
        for layer in self._layers:
            check_window(layer.window)
            kind = (layer.query_heads // self._heads, NO_WINDOW if layer.window is None else layer.window, layer.plain)
            numbers.append(kinds.setdefault(kind, len(kinds)))
        self._kind_of = np.array(numbers, np.int64)
        self._kinds = np.array([kind[:2] for kind in kinds], np.int32)
        self._plain = [kind[2] for kind in kinds]

    def _hold(self, keys: int, tiles: int, segments: int) -> None:
        """Make room, with some to spare."""
        kinds = len(self._kinds)
        self._keys = np.zeros(2 * keys, np.int32)
        self._tiles = np.zeros((kinds, 2 * tiles, 8), np.int32)
        self._skips = np.zeros((kinds, 2 * segments), np.bool_)

    def _hold_parts(self, parts: int) -> None:
        """Room for partial sums and the counters of ``parts`` parts."""
        packed = int(self._blocks[:, 28].max())
        self._blocks[:, 13] = self._partial.hold(self._heads * parts * packed * (self._size + 2))
        self._blocks[:, 14] = self._done.hold(self._heads * parts)

    def _fix(self, index: int) -> None:
        """The fields of a layer's block that no batch changes."""
        keys, values, scales = self._planes
        layer, block, sinks = self._layers[index], self._blocks[index], self._sinks[index]
        block[0] = self._counters.ctypes.data + index * self._counters.strides[0]
        block[2], block[3] = keys[index].data_ptr(), values[index].data_ptr()
        block[15] = self._numbers.ctypes.data + index * self._numbers.strides[0]
        block[17:22] = layer.query_heads, self._slots, self._heads, self._size, self._size
        if sinks is not None:
            block[5], block[24] = sinks.data_ptr(), layer.query_heads
        block[28] = max(PACKED, layer.query_heads // self._heads)
        if scales is not None:
            block[31:34] = scales[index][0].data_ptr(), scales[index][1].data_ptr(), self._slots


def _storage(keys: Sequence[Tensor], values: Sequence[Tensor]) -> str:
    dtypes = {plane.dtype for plane in (*keys, *values)}
    names = ", ".join(map(str, dtypes))
    storage = cpu.STORAGE.get(dtypes.pop()) if len(dtypes) == 1 else None
    if storage is None or not all(plane.is_contiguous() for plane in (*keys, *values)):
        raise ValueError(f"the kernel reads contiguous planes of one dtype, not {names}")
    if any(k.shape != v.shape for k, v in zip(keys, values, strict=True)) or len({k.shape for k in keys}) != 1:
        raise ValueError("the kernel's planes have one shape, K and V alike")
    return storage
