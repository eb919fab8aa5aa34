"""A layer stack that runs what the native step can run in one call, and the rest through the checkpoint's modules."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import torch
from torch import Tensor

from headrace.core.batch import Batch
from headrace.models.attention.interface import AttentionBackend
from headrace.models.attention.retrieving import Retriever
from headrace.models.cache.planes import Planes
from headrace.models.fused.layers import LayerRecogniser, recognise_embedding, recognise_head
from headrace.models.fused.step import Angles, NativeLayer, NativeStep, usable
from headrace.models.hook import Step
from headrace.models.stack import LayerStack, State

log = logging.getLogger(__name__)


class NativeStack(LayerStack):
    """A layer stack whose recognised layers, embedding and head run natively; layers of both kinds may alternate.

    With an attention backend other than the CPU kernel it is a plain :class:`LayerStack`. Its results are fresh tensors.

    Args:
        module: a transformers ``*ForCausalLM`` of a known anatomy with its fused parts in place, which attends through headrace.
    """

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        with torch.inference_mode():
            layers = self._recognised(module.config)
            hidden = self._anatomy.embed.weight.shape[1]
            embedding, head = recognise_embedding(self._anatomy), recognise_head(self._anatomy, super().head)
            self._native = NativeStep(layers, self.depth, hidden, embedding, head)
        self._planes: Planes | None = None
        groups = [(native, list(found)) for native, found in itertools.groupby(range(self.depth), layers.__contains__)]
        self._spans = [(group[0], group[-1] + 1, native) for native, group in groups]
        log.info(
            "%d of %d layers run natively, embedding %s, head %s",
            len(layers), self.depth, "too" if embedding else "not", "too" if head else "not",
        )  # fmt: skip

    @property
    def native_layers(self) -> list[int]:
        """The layers that run natively."""
        return list(self._native.layers)

    def whole(self, backend: AttentionBackend, planes: Planes) -> bool:
        """Whether all of it is native and can attend so, and hence :meth:`run` may be called with ``planes``."""
        parts = self._native
        complete = len(parts.layers) == self.depth and parts.embedding is not None and parts.head is not None
        return complete and usable(backend, planes)

    @property
    def plain(self) -> bool:
        """Whether no native layer has a window, a soft cap or sinks, so that a retriever may have its say in all of them."""
        return self._native.plain

    def run(self, batch: Batch, planes: Planes, retriever: Retriever | None = None) -> Tensor:
        """float32[R, vocabulary] of ``batch.head_rows``, in native calls, between which a retriever attends to its segments."""
        logits = self._native.run(0, self.depth, batch, planes, embed=True, project=True, retriever=retriever)
        assert logits is not None
        return logits

    def layers(self, state: State, lo: int, hi: int, step: Step) -> State:
        """Run layers ``lo`` to ``hi - 1``, which attend through ``step``."""
        planes = self._planes_of(step)
        if not usable(step.backend, planes) or (step.retriever is not None and not self.plain):
            return super().layers(state, lo, hi, step)
        rows = self._native.rows(state.hidden.shape[1])
        rows.copy_(state.hidden[0])
        batch = step.attention.batch if step.bare is None else step.bare.batch
        for first, last, native in self._spans:
            first, last = max(first, lo), min(last, hi)
            if native and first < last:
                self._native.run(first, last, batch, planes, retriever=step.retriever)
                step.calls += last - first
            elif first < last:
                now = State(rows[None], state.positions, state.rotary)
                rows.copy_(super().layers(now, first, last, step).hidden[0])
        return State(rows.clone()[None], state.positions, state.rotary)

    def head(self, hidden: Tensor) -> Tensor:
        """Final norm and LM head: hidden rows [R, h] to float32[R, vocabulary]."""
        return super().head(hidden) if self._native.head is None else self._native.project(hidden)

    def _planes_of(self, step: Step) -> Planes:
        """The planes of ``step``, the same object for the same planes."""
        if self._planes is None or self._planes.keys is not step.keys:
            self._planes = Planes(step.keys, step.values, step.scales)  # type: ignore[arg-type]
        return self._planes

    def _recognised(self, config: Any) -> dict[int, NativeLayer]:
        recognise, tables, found = LayerRecogniser(self.depth), dict[str | None, Angles](), {}
        for index, layer in enumerate(self._anatomy.layers):
            kind = self._types[index] if self._typed_rotary else None
            if self._anatomy.rotary is not None and kind not in tables:
                named = () if kind is None else (kind,)
                tables[kind] = Angles(self._anatomy.rotary, *named, limit=_positions(config))
            native = recognise(layer, tables.get(kind))
            if native is not None:
                found[index] = native
        return found


def _positions(config: Any) -> int:
    """Positions for which rotary modules keep their angles; beyond the original context some change them."""
    longest = int(getattr(config, "max_position_embeddings", 0) or 1 << 30)
    parameters = getattr(config, "rope_parameters", None) or {}
    dynamic = "dynamic" in str(parameters.get("rope_type", ""))
    return min(longest, int(parameters.get("original_max_position_embeddings") or longest)) if dynamic else longest
