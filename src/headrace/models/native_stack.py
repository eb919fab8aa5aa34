"""A layer stack that runs what the native step can run in one call, and the rest through the checkpoint's modules."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import torch
from torch import Tensor

from headrace.models.hook import Step
from headrace.models.native_layers import LayerRecogniser, recognise_embedding, recognise_head
from headrace.models.native_step import Angles, NativeLayer, NativeStep, usable
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

    def layers(self, state: State, lo: int, hi: int, step: Step) -> State:
        """Run layers ``lo`` to ``hi - 1``, which attend through ``step``."""
        if not usable(step):
            return super().layers(state, lo, hi, step)
        rows = self._native.rows(state.hidden.shape[1])
        rows.copy_(state.hidden[0])
        self._through(lo, hi, step, state)
        return State(rows.clone()[None], state.positions, state.rotary)

    def head(self, hidden: Tensor) -> Tensor:
        """Final norm and LM head: hidden rows [R, h] to float32[R, vocabulary]."""
        return super().head(hidden) if self._native.head is None else self._native.project(hidden)

    def logits(self, ids: Tensor, positions: Tensor, rows: Tensor | None, step: Step) -> Tensor:
        """The whole pass; only ``rows`` reach the head."""
        if not usable(step):
            return super().logits(ids, positions, rows, step)
        native, wanted = self._native, torch.arange(len(ids)) if rows is None else rows
        hidden = native.rows(len(ids))
        starts = native.embedding is not None and self._spans[0][2]
        state = None if starts and len(self._spans) == 1 else self.embed(ids, positions)
        if state is not None and not starts:
            hidden.copy_(state.hidden[0])
        logits = self._through(
            0, self.depth, step, state, ids.to(torch.int32) if starts else None, wanted.to(torch.int32)
        )
        return self.head(hidden.index_select(0, wanted)) if logits is None else logits

    def _through(
        self, lo: int, hi: int, step: Step, state: State | None, ids: Tensor | None = None, wanted: Tensor | None = None
    ) -> Tensor | None:
        """Layers [lo, hi) on the native step's rows.

        Args:
            state: positions and angles, for layers that run through their modules.
            ids: to start with the embedding.
            wanted: rows for the head, if the last layer and the head are native; otherwise it is left to the caller.
        """
        for first, last, native in self._spans:
            first, last = max(first, lo), min(last, hi)
            if first >= last:
                continue
            if native:
                ends = last == self.depth and self._native.head is not None
                found = self._native.run(
                    first, last, step, ids=ids if first == 0 else None, wanted=wanted if ends else None
                )
                if found is not None:
                    return found
            else:
                assert state is not None
                rows = self._native.rows(state.hidden.shape[1])
                state = State(rows[None], state.positions, state.rotary)
                rows.copy_(super().layers(state, first, last, step).hidden[0])
        return None

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
