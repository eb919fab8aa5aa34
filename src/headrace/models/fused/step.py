"""Runs recognised decoder layers, the embedding and the head in native calls: one per step, unless attention wants breaks."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headrace.core.batch import Batch, Ints
from headrace.models.attention.cpu import NumbaAttention
from headrace.models.attention.inline import InlineAttention, LayerAttention
from headrace.models.attention.interface import AttentionBackend
from headrace.models.attention.retrieving import Retriever
from headrace.models.cache.planes import Planes
from headrace.models.fused.modules import FusedAttention, FusedMLP, FusedNorm
from headrace.native import blocks, step
from headrace.native.skinny import PackedMatrix

Norms = tuple[FusedNorm | None, FusedNorm | None, FusedNorm | None, FusedNorm | None]

LINE = 64
FIRST_POSITIONS = 4096


class Angles:
    """Cosines and sines of rotary positions, by the checkpoint's own module, kept for as many positions as were met.

    Args:
        rotary: called with (a float32 tensor, int[1, N] positions, *kind) it gives both, float32[1, N, T] each.
        kind: what else it wants, the type of the layers.
        limit: positions that will ever be met; some modules change their angles for good when asked for more.
    """

    def __init__(self, rotary: Any, *kind: str, limit: int) -> None:
        self._rotary, self._kind, self._limit = rotary, kind, limit
        self.cosines, self.sines = torch.empty(0, 0), torch.empty(0, 0)
        self.cover(0)

    def cover(self, position: int) -> bool:
        """Make the tables reach ``position``; whether they had to be made anew, and so have moved."""
        if position < len(self.cosines):
            return False
        count = max(min(max(2 * position, FIRST_POSITIONS), self._limit), position + 1)
        found = self._rotary(torch.zeros(1), torch.arange(count)[None], *self._kind)
        self.cosines, self.sines = (part[0].float().contiguous() for part in found)
        return True


@dataclass(frozen=True, slots=True)
class NativeLayer:
    """A decoder layer made of fused parts.

    Attributes:
        attention, mlp: its two halves.
        norms: before and after attention, before and after the MLP.
        residual: factor on what each half adds.
        angles: of its rotated heads, None where they are not rotated.
        attends: how it attends.
    """

    attention: FusedAttention
    mlp: FusedMLP
    norms: Norms
    residual: float
    angles: Angles | None
    attends: LayerAttention


@dataclass(frozen=True, slots=True)
class NativeHead:
    """Final norm and LM head; logits become ``softcap * tanh(scale * logits / softcap)``, or ``scale * logits`` without a cap."""

    norm: FusedNorm
    matrix: PackedMatrix
    scale: float
    softcap: float | None


@dataclass(frozen=True, slots=True)
class NativeEmbedding:
    """float32[vocabulary, h] embeddings and the factor on them."""

    table: Tensor
    scale: float


class _Buffers:
    """Rows that the step computes in; they grow, and stay where they are until they do."""

    def __init__(self, layers: Sequence[NativeLayer], hidden: int) -> None:
        attended = [layer.attention.out.depth for layer in layers]
        inner = [layer.mlp.down.depth for layer in layers]
        wide = [m.columns for layer in layers for m in (layer.attention.qkv, layer.mlp.gate_up)]
        self._asked = max(attended, default=1)
        self._widths = {"x": hidden, "input": max(hidden, *inner, 1), "output": max(hidden, *wide, 1)}
        self._widest = -(-max(hidden, *inner, self._asked) // LINE) * LINE
        self.rows = 0

    def hold(self, rows: int) -> bool:
        """Make room for ``rows``; whether everything has moved."""
        if rows <= self.rows:
            return False
        self.rows = rows = max(rows, min(2 * self.rows, self.rows + 256))
        self.x, self.input, self.output = (torch.empty(rows, width) for width in self._widths.values())
        self.queries, self.attended = torch.empty(rows * self._asked), torch.empty(rows * self._asked)
        self.scales = torch.empty(rows)
        self.bytes = torch.empty(rows * self._widest + LINE, dtype=torch.uint8)
        self.bytes = self.bytes[-self.bytes.data_ptr() % LINE :]
        return True


class NativeStep:
    """Holds the program of a model's native layers, and runs parts of it.

    One instance runs one step at a time, on torch's threads, and computes in buffers of its own.

    Args:
        layers: by index; indices that are missing belong to layers that run elsewhere.
        depth: layers of the model.
        hidden: width of the residual stream.
        embedding, head: None where they run elsewhere.
    """

    def __init__(
        self,
        layers: Mapping[int, NativeLayer],
        depth: int,
        hidden: int,
        embedding: NativeEmbedding | None = None,
        head: NativeHead | None = None,
    ) -> None:
        self.layers, self.hidden, self.embedding, self.head = dict(layers), hidden, embedding, head
        self._numbers = {index: at for at, index in enumerate(self.layers)}
        self._angles = list({id(i.angles): i.angles for i in self.layers.values() if i.angles is not None}.values())
        self._buffers = _Buffers(list(self.layers.values()), hidden)
        self._structs = (step.Layer * depth)()
        self._attention: InlineAttention | None = None
        self._planes: Planes | None = None
        self._threads = 0  # that the attention's scratch memory is for
        self._step = step.Step(layers=ctypes.addressof(self._structs), hidden=hidden)
        self._parts = _head(head), step.Embedding(embedding.table.data_ptr(), embedding.scale) if embedding else None
        self._head_address, self._embedding_address = (None if i is None else ctypes.addressof(i) for i in self._parts)
        for index, layer in self.layers.items():
            _describe(self._structs[index], layer)
        self._turn()

    @property
    def plain(self) -> bool:
        """Whether no layer has a window, a soft cap or sinks."""
        return all(layer.attends.plain and layer.attends.window is None for layer in self.layers.values())

    def rows(self, count: int) -> Tensor:
        """float32[count, hidden]: where :meth:`run` finds and leaves the residual stream. Valid until more rows are asked for."""
        self._make_room(count)
        return self._buffers.x[:count]

    def run(
        self,
        first: int,
        last: int,
        batch: Batch,
        planes: Planes,
        *,
        embed: bool = False,
        project: bool = False,
        retriever: Retriever | None = None,
    ) -> Tensor | None:
        """Run layers [first, last), all of them native, on the rows of ``batch`` in :meth:`rows`.

        Args:
            planes: where K and V live; asked for once, as long as it is the same object.
            embed: start with the embedding of ``batch.ids``.
            project: end with the head of ``batch.head_rows``.
            retriever: gets its say behind the attention of every layer; the layers must be :attr:`plain`.

        Returns:
            With ``project`` float32[R, vocabulary], else None.

        Raises:
            IndexError: a token id that the embedding has no row for, which native code would read all the same.
        """
        attention = self._attention
        if attention is None or self._planes is not planes:
            attention = self._attach(planes)
        tokens = len(batch.ids)
        if embed:
            self._check_ids(batch.ids)
        self._make_room(tokens)
        found = attention.begin(batch)
        moved = [angles.cover(found.farthest) for angles in self._angles]
        if any(moved):
            self._turn()
        program = self._step
        program.begin, program.rows, program.head = 2 * first, tokens, None
        program.ids, program.positions, program.slots = found.ids, found.positions, found.writes
        program.embedding = self._embedding_address if embed else None
        for index in range(first, last):
            number = self._numbers[index]
            if retriever is None and number not in found.left:
                continue
            self._call(2 * index + 1)
            attention.finish(number, found.left.get(number, []))
            if retriever is not None:
                queries, keys, values, out, scale, scales = attention.views(number, tokens)
                retriever.attend(self.layers[index].attention.layer_idx, queries, keys, values, out, scale, scales)
        logits = self._want(found.wanted, len(batch.head_rows)) if project else None
        self._call(2 * last)
        return logits

    def _check_ids(self, ids: Ints) -> None:
        known = 0 if self.embedding is None else len(self.embedding.table)
        if len(ids) and (ids.max() >= known or ids.min() < 0):
            raise IndexError(f"token ids from {ids.min()} to {ids.max()}: the embedding has rows 0 to {known - 1}")

    def project(self, rows: Tensor) -> Tensor:
        """The head alone: float32[R, vocabulary] of hidden rows [R, h]."""
        self.rows(len(rows)).copy_(rows)
        program = self._step
        program.begin, program.rows, program.embedding = 0, 0, None
        wanted = torch.arange(len(rows), dtype=torch.int32)
        logits = self._want(wanted.data_ptr(), len(rows))
        self._call(0)
        return logits

    def _call(self, end: int) -> None:
        self._step.end = end
        step.run(self._step)
        self._step.begin, self._step.embedding = end, None

    def _want(self, wanted: int, count: int) -> Tensor:
        """Set the head to go behind, and give the logits that it will fill: fresh ones, as whoever gets them may keep them."""
        assert self.head is not None
        logits = torch.empty(count, self.head.matrix.columns)
        program = self._step
        program.head, program.wanted, program.logit_rows = self._head_address, wanted, count
        program.logits = logits.data_ptr()
        return logits

    def _attach(self, planes: Planes) -> InlineAttention:
        """Point all layers at ``planes``."""
        at = [layer.attention.layer_idx for layer in self.layers.values()]
        keys, values = [planes.keys[i] for i in at], [planes.values[i] for i in at]
        scales = None if planes.scales is None else [planes.scales[i] for i in at]
        inline = InlineAttention([layer.attends for layer in self.layers.values()], keys, values, scales)
        for number, index in enumerate(self.layers):
            struct = self._structs[index]
            struct.attend, struct.block = inline.worker, inline.address(number)
            struct.planes.keys, struct.planes.values = keys[number].data_ptr(), values[number].data_ptr()
            if scales is not None:
                struct.planes.key_scales, struct.planes.value_scales = (part.data_ptr() for part in scales[number])
        self._attention, self._planes, self._threads = inline, planes, 0
        return inline

    def _turn(self) -> None:
        """Point all layers at the tables of angles."""
        for index, layer in self.layers.items():
            if (angles := layer.angles) is not None:
                struct = self._structs[index]
                struct.cosines, struct.sines = angles.cosines.data_ptr(), angles.sines.data_ptr()
                struct.turned = angles.cosines.shape[1]

    def _make_room(self, rows: int) -> None:
        buffers, threads = self._buffers, torch.get_num_threads()
        moved = buffers.hold(rows)
        if moved:
            for name in ("x", "input", "output", "queries", "attended", "bytes", "scales"):
                setattr(self._step, name, getattr(buffers, name).data_ptr())
        if self._attention is not None and (moved or threads != self._threads):
            self._attention.between(buffers.queries, buffers.attended, threads)
            self._threads = threads


def usable(backend: AttentionBackend, planes: Planes) -> bool:
    """Whether the native step can attend so: by the CPU kernel, over planes that it can write to."""
    return isinstance(backend, NumbaAttention) and planes.keys[0].dtype in (torch.float32, torch.int8)


def _describe(struct: step.Layer, layer: NativeLayer) -> None:
    attention, mlp = layer.attention, layer.mlp
    struct.qkv, struct.out = attention.qkv.address, attention.out.address
    struct.gate_up, struct.down = mlp.gate_up.address, mlp.down.address
    for name, norm in zip(("before_attention", "after_attention", "before_mlp", "after_mlp"), layer.norms, strict=True):
        setattr(struct, name, _norm(norm))
    if attention.norms is not None:
        struct.queries, struct.keys = map(_norm, attention.norms)
    struct.query_heads, struct.heads, struct.size = attention.heads
    struct.interleaved = attention.rotary == "interleaved"
    struct.residual, struct.activation, struct.gated = layer.residual, blocks.ACTIVATIONS[mlp.activation], mlp.gated


def _norm(norm: FusedNorm | None) -> step.Norm:
    return step.Norm() if norm is None else step.Norm(norm.scale.data_ptr(), len(norm.scale), norm.epsilon)


def _head(head: NativeHead | None) -> step.Head | None:
    return None if head is None else step.Head(_norm(head.norm), head.matrix.address, head.scale, head.softcap or 0.0)
