"""The CPU kernel's argument blocks for all layers of a step, so that native code can attend in the middle of its own threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from headrace.models.attention import cpu, dense
from headrace.models.attention.cpu import NumbaStep
from headrace.models.attention.tiles import PACKED, scratch_size
from headrace.models.attention.worker import FIELDS

# Fields of a block (see ``worker``) that change from step to step.
_CHANGING = [1, 4, *range(6, 15), 16, 22, 23, 25, 26, 27, 29, 30]


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """How a layer attends: query heads, factor on the scores, window, soft cap and sinks (float32[Hq]), as for ``attend``."""

    query_heads: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


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
        self.planes = keys, values, scales
        self._layers = layers
        self.worker: int = cpu.compiled(_storage(keys, values)).address
        depth = len(layers)
        self._blocks = np.zeros((depth, FIELDS), np.int64)
        self._counters = np.zeros((depth, 2), np.int64)
        self._numbers = np.array([(layer.scale, layer.softcap or 0.0) for layer in layers], np.float32)
        self._sinks = [None if i.sinks is None else i.sinks.detach().float().contiguous() for i in layers]
        self._partial, self._done, self._scratch = cpu.Room(np.float32), cpu.Room(np.int64), cpu.Room(np.float32)
        for index, layer in enumerate(layers):
            self._fix(index, layer)
        kinds: dict[tuple[int, int | None, bool], list[int]] = {}
        for index, layer in enumerate(layers):
            plain = layer.softcap is None and layer.sinks is None
            kinds.setdefault((layer.query_heads // keys[index].shape[1], layer.window, plain), []).append(index)
        self._kinds = [(kind, np.ix_(members, _CHANGING), members) for kind, members in kinds.items()]

    def address(self, layer: int) -> int:
        """Of the layer's block; it never changes."""
        return self._blocks.ctypes.data + layer * self._blocks.strides[0]

    def begin(self, step: NumbaStep, queries: Tensor, out: Tensor, threads: int) -> dict[int, list[dense.Chunk]]:
        """Make all blocks ready for a step.

        Args:
            step: what the backend prepared for the batch.
            queries, out: float32[at least N * Hq * D] that the worker reads and writes, and that must stay where they are.
            threads: members of the team that will call the worker.

        Returns:
            Per layer the chunks that the worker leaves out, for :meth:`finish`; layers without any are missing.

        Raises:
            ValueError: when the batch reads slots beyond the planes.
        """
        slots, heads, size = self.planes[0][0].shape
        if step.top_slot >= slots:
            raise ValueError(f"the planes have {slots} slots; the batch needs {step.top_slot + 1}")
        self._counters.fill(0)
        left: dict[int, list[dense.Chunk]] = {}
        for (group, window, plain), where, members in self._kinds:
            cut = cpu.cut_of(step, group, window, plain=plain)
            self._blocks[where] = (
                queries.data_ptr(),
                out.data_ptr(),
                *step.addresses,
                cut.address,
                self._partial.hold(heads * cut.parts * max(PACKED, group) * (size + 2)),
                self._done.hold(heads * cut.parts),
                step.batch.tokens,
                step.batch.segments,
                len(step.keys),
                len(step.batch.mask_words),
                len(cut.tiles),
                cut.parts,
                cut.window,
                self._scratch.hold(threads * scratch_size(group, size, size)),
            )
            if cut.chunks:
                left.update(dict.fromkeys(members, cut.chunks))
        return left

    def finish(self, layer: int, queries: Tensor, out: Tensor, chunks: list[dense.Chunk]) -> None:
        """Attend to the rows that the layer's worker left out; ``queries`` and ``out`` as for :meth:`begin`."""
        keys, values, scales = self.planes
        shape = (-1, self._layers[layer].query_heads, keys[layer].shape[2])
        size = shape[1] * shape[2]
        for chunk in chunks:
            upto = chunk.rows.stop * size
            dense.attend(
                queries[:upto].view(shape),
                keys[layer],
                values[layer],
                out[:upto].view(shape),
                chunk,
                self._layers[layer].scale,
                None if scales is None else scales[layer],
            )

    def _fix(self, index: int, layer: LayerAttention) -> None:
        keys, values, scales = self.planes
        (slots, heads, size), block, sinks = keys[index].shape, self._blocks[index], self._sinks[index]
        block[0] = self._counters.ctypes.data + index * self._counters.strides[0]
        block[2], block[3] = keys[index].data_ptr(), values[index].data_ptr()
        block[15] = self._numbers.ctypes.data + index * self._numbers.strides[0]
        block[17:22] = layer.query_heads, slots, heads, size, size
        if sinks is not None:
            block[5], block[24] = sinks.data_ptr(), layer.query_heads
        block[28] = max(PACKED, layer.query_heads // heads)
        if scales is not None:
            block[31:34] = scales[index][0].data_ptr(), scales[index][1].data_ptr(), slots


def _storage(keys: Sequence[Tensor], values: Sequence[Tensor]) -> str:
    dtypes = {plane.dtype for plane in (*keys, *values)}
    storage = cpu.STORAGE.get(*dtypes) if len(dtypes) == 1 else None
    if storage is None or not all(plane.is_contiguous() for plane in (*keys, *values)):
        raise ValueError(f"the kernel reads contiguous planes of one dtype, not {', '.join(map(str, dtypes))}")
    if any(k.shape != v.shape for k, v in zip(keys, values, strict=True)) or len({k.shape for k in keys}) != 1:
        raise ValueError("the kernel's planes have one shape, K and V alike")
    return storage
