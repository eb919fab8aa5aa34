"""Recognises the parts of a fused decoder that the native step can run.

A layer is taken when all its parts are fused ones and some arrangement of its norms, run natively, agrees with the layer itself on
random rows: outputs, keys and values. Names decide nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headrace.core.batch import Batch, Packer, Segment
from headrace.models.attention.cpu import NumbaAttention
from headrace.models.attention.inline import LayerAttention
from headrace.models.cache.planes import Planes
from headrace.models.families import Anatomy
from headrace.models.fused import modules as fused
from headrace.models.fused.linear import PackedLinear
from headrace.models.fused.modules import FusedAttention, FusedMLP, FusedNorm
from headrace.models.fused.step import Angles, NativeEmbedding, NativeHead, NativeLayer, NativeStep, Norms
from headrace.models.hook import Step

PLACES = 4  # where a norm can stand: before and after attention, before and after the MLP
ROWS = 6  # of a trial


class LayerRecogniser:
    """Finds the native form of layers, one after another; it tries first what the last one was.

    Args:
        depth: layers of the model, hence planes that a layer may ask for.
    """

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._last: tuple[tuple[int | None, ...], float] | None = None

    def __call__(self, layer: nn.Module, angles: Angles | None) -> NativeLayer | None:
        """The native form of ``layer``, whose heads are rotated by ``angles``; None where there is none."""
        children = list(layer.children())
        attention, mlp = _only(children, FusedAttention), _only(children, FusedMLP)
        norms = [child for child in children if isinstance(child, FusedNorm)]
        others = [child for child in children if not isinstance(child, FusedAttention | FusedMLP | FusedNorm)]
        if attention is None or mlp is None or (attention.rotary and angles is None):
            return None
        if any(True for _ in layer.parameters(recurse=False)) or any(fused.hooked(part) for part in (layer, *children)):
            return None
        if any(True for other in others for _ in other.parameters()):
            return None
        attends = attends_by(attention)
        for trial in self._trials(layer, len(norms)):
            places, residual = trial
            placed: Norms = tuple(None if at is None else norms[at] for at in places)  # type: ignore[assignment]
            found = NativeLayer(attention, mlp, placed, residual, angles if attention.rotary else None, attends)
            if all(self._agree(layer, found, angles, size) for size in (1.0, 1e-2)):
                self._last = trial
                return found
        return None

    def _trials(self, layer: nn.Module, norms: int) -> Iterator[tuple[tuple[int | None, ...], float]]:
        """Which norm stands where, and the factor on what is added to the residual stream."""
        if self._last is not None and len([at for at in self._last[0] if at is not None]) == norms:
            yield self._last
        factors = dict.fromkeys((1.0, float(getattr(layer, "residual_multiplier", 1.0))))
        for places in (
            itertools.permutations([*range(norms), *[None] * (PLACES - norms)], PLACES) if norms <= PLACES else ()
        ):
            for factor in factors:
                yield places, factor

    def _agree(self, layer: nn.Module, native: NativeLayer, angles: Angles | None, size: float) -> bool:
        """Whether both bring forth the same rows, keys and values from random rows of about ``size``."""
        batch = Packer().pack([_segment()])
        rows = fused.random(ROWS, native.attention.qkv.depth) * size
        wanted, got = (_fresh_planes(native, self._depth) for _ in range(2))
        expected = _by_module(layer, angles, rows, batch, wanted)
        program = NativeStep({0: native}, 1, rows.shape[1])
        program.rows(ROWS).copy_(rows)
        program.run(0, 1, batch, got)
        tolerance = fused.tolerance(native.attention.qkv)
        at = native.attention.layer_idx
        planes = (wanted.keys[at], got.keys[at]), (wanted.values[at], got.values[at])
        return all(fused.same(a, b, tolerance) for a, b in ((expected, program.rows(ROWS)), *planes))


def attends_by(attention: FusedAttention) -> LayerAttention:
    """How ``attention`` attends, by the settings that it was seen to hand to the attention function."""
    settings, (heads, _, size) = attention.settings, attention.heads
    scale, sinks = settings.get("scaling"), settings.get("s_aux")
    return LayerAttention(
        heads,
        size**-0.5 if scale is None else float(scale),
        settings.get("sliding_window"),
        settings.get("softcap"),
        sinks,
    )


def recognise_embedding(anatomy: Anatomy) -> NativeEmbedding | None:
    """The embedding when it is a table times a factor."""
    weight: Tensor = anatomy.embed.weight
    if weight.dtype is not torch.float32 or weight.device.type != "cpu" or not weight.is_contiguous():
        return None
    factor = 1.0 if anatomy.embed_scale is None else anatomy.embed_scale
    scale = factor * float(getattr(anatomy.embed, "embed_scale", 1.0))
    ids = torch.arange(0, len(weight), max(1, len(weight) // 8))
    return (
        NativeEmbedding(weight.detach(), scale)
        if fused.same(anatomy.embed(ids) * factor, weight[ids] * scale)
        else None
    )


def recognise_head(anatomy: Anatomy, reference: Callable[[Tensor], Tensor]) -> NativeHead | None:
    """The final norm and LM head when they are fused and packed and do what ``reference`` does."""
    if not isinstance(anatomy.norm, FusedNorm) or not isinstance(anatomy.head, PackedLinear):
        return None
    scale = 1.0 if anatomy.logit_scale is None else float(anatomy.logit_scale)
    head = NativeHead(anatomy.norm, anatomy.head.matrix, scale, anatomy.logit_softcap)
    rows = fused.random(ROWS, head.matrix.depth)
    found = NativeStep({}, 0, head.matrix.depth, None, head).project(rows)
    return head if fused.same(reference(rows), found, fused.tolerance(head.matrix)) else None


def _only(children: list[nn.Module], kind: type[Any]) -> Any:
    found = [child for child in children if isinstance(child, kind)]
    return found[0] if len(found) == 1 else None


def _segment() -> Segment:
    rows = np.arange(ROWS, dtype=np.int32)
    return Segment(0, rows, rows, rows[::-1].copy(), rows[:0], rows)


def _by_module(layer: nn.Module, angles: Angles | None, rows: Tensor, batch: Batch, planes: Planes) -> Tensor | None:
    backend, positions = NumbaAttention(), torch.from_numpy(batch.positions)
    prepared = backend.prepare(batch, torch.device("cpu"))
    step = Step(backend, prepared, planes.keys, planes.values, torch.from_numpy(batch.write_slots).long())
    turn = None if angles is None else (angles.cosines[positions][None], angles.sines[positions][None])
    found = fused.outcome(
        layer, rows[None], attention_mask=None, position_ids=positions[None], position_embeddings=turn, headrace_step=step
    )  # fmt: skip
    found = found[0] if isinstance(found, tuple) else found
    return found.view(rows.shape) if isinstance(found, Tensor) and found.numel() == rows.numel() else None


def _fresh_planes(native: NativeLayer, depth: int) -> Planes:
    """Planes that only the layer under trial may use, whichever it says is its own."""
    _, heads, size = native.attention.heads
    keys, values = ([torch.zeros(ROWS, heads, size)] * depth for _ in "kv")
    return Planes(keys, values, None)
