"""The layer stack: a transformers decoder taken apart into ``embed -> layers[lo, hi) -> head``.

Going layer by layer lets a machine hold part of a model, lets only the wanted rows through the LM head, and skips the mask
building and output recording of the whole forward. The modules and weights are the checkpoint's own; each family is tested
against its whole forward, split at every layer boundary. A model whose anatomy is not in the table of
:mod:`headrace.models.families` still runs, but only whole.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from headrace.core.errors import UnsupportedModel
from headrace.models import families
from headrace.models.hook import Step


@dataclass(slots=True)
class State:
    """Activations on their way through the layers.

    Attributes:
        hidden: [1, N, h] input of the next layer.
        positions: int[1, N].
        rotary: cosines and sines per layer type (under None where all layers share them); empty for models without.
    """

    hidden: Tensor
    positions: Tensor
    rotary: dict[str | None, Any]


class Forward(Protocol):
    """What a runner needs of a model."""

    def logits(self, ids: Tensor, positions: Tensor, rows: Tensor | None, step: Step) -> Tensor:
        """float32[R, vocabulary] of ``rows`` (all when None) for ids and positions [N]."""


class LayerStack:
    """An adapter over an unpatched ``*ForCausalLM`` module whose family is in the table.

    Raises:
        UnsupportedModel: when the module's anatomy is unknown.
    """

    def __init__(self, module: Any) -> None:
        anatomy = families.anatomy(module)
        if anatomy is None:
            raise UnsupportedModel(
                f"no layer-by-layer form of {type(module).__name__} is known: it can only run whole, on one machine",
                field="model",
            )
        self._anatomy = anatomy
        self._types = families.layer_types(module.config, len(anatomy.layers))
        rotary = anatomy.rotary
        self._typed_rotary = rotary is not None and "layer_type" in inspect.signature(rotary.forward).parameters

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self._anatomy.layers)

    def embed(self, ids: Tensor, positions: Tensor) -> State:
        """Start a pass from token ids.

        Args:
            ids: int[N]; positions: int[N].
        """
        hidden = self._anatomy.embed(ids.unsqueeze(0))
        if self._anatomy.embed_scale is not None:
            hidden = hidden * self._anatomy.embed_scale
        return self.resume(hidden, positions)

    def resume(self, hidden: Tensor, positions: Tensor) -> State:
        """Start a pass in the middle, from the hidden states [1, N, h] that an earlier stage sent."""
        positions = positions.unsqueeze(0)
        return State(hidden, positions, self._rotary(hidden, positions))

    def layers(self, state: State, lo: int, hi: int, step: Step) -> State:
        """Run layers ``lo`` to ``hi - 1``, which attend through ``step``."""
        hidden, positions, rotary = state.hidden, state.positions, state.rotary
        for index in range(lo, hi):
            out = self._anatomy.layers[index](
                hidden,
                attention_mask=None,
                position_ids=positions,
                position_embeddings=rotary.get(self._types[index] if self._typed_rotary else None),
                headrace_step=step,
            )
            hidden = out[0] if isinstance(out, tuple) else out
        return State(hidden, positions, rotary)

    def head(self, hidden: Tensor) -> Tensor:
        """Final norm and LM head: hidden rows [R, h] to float32[R, vocabulary]."""
        logits: Tensor = self._anatomy.head(self._anatomy.norm(hidden))
        if self._anatomy.logit_scale is not None:
            logits = logits * self._anatomy.logit_scale
        logits = logits.float()
        if (cap := self._anatomy.logit_softcap) is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits

    def logits(self, ids: Tensor, positions: Tensor, rows: Tensor | None, step: Step) -> Tensor:
        """The whole pass; only ``rows`` reach the head."""
        hidden = self.layers(self.embed(ids, positions), 0, self.depth, step).hidden[0]
        return self.head(hidden if rows is None else hidden.index_select(0, rows))

    def _rotary(self, hidden: Tensor, positions: Tensor) -> dict[str | None, Any]:
        rotary = self._anatomy.rotary
        if rotary is None:
            return {}
        if self._typed_rotary:
            return {kind: rotary(hidden, positions, kind) for kind in set(self._types)}
        return {None: rotary(hidden, positions)}


class WholeForward:
    """A model run through its own forward, for families outside the table.

    Raises:
        UnsupportedModel: when the forward takes no ``position_ids``, without which packed segments cannot be told apart.
    """

    def __init__(self, module: Any) -> None:
        accepted = inspect.signature(module.forward).parameters
        if "position_ids" not in accepted:
            raise UnsupportedModel(
                f"{type(module).__name__} takes no position_ids, so sequences cannot be packed into one step: "
                "serve it with plain transformers instead",
                field="model",
            )
        self._module = module
        self._keeps = "logits_to_keep" in accepted

    def logits(self, ids: Tensor, positions: Tensor, rows: Tensor | None, step: Step) -> Tensor:
        """The whole pass; only ``rows`` reach the head where the model can leave rows out."""
        keep = {"logits_to_keep": rows} if self._keeps and rows is not None else {}
        out = self._module(
            input_ids=ids.unsqueeze(0), position_ids=positions.unsqueeze(0), use_cache=False, headrace_step=step, **keep
        )
        logits: Tensor = out.logits[0]
        return (logits if rows is None or self._keeps else logits.index_select(0, rows)).float()


def forward_of(module: Any) -> LayerStack | WholeForward:
    """The layer stack of ``module`` if its anatomy is known, else the module run whole."""
    return WholeForward(module) if families.anatomy(module) is None else LayerStack(module)
