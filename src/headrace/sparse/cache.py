"""``PQCache``: a cache for transformers' ``generate`` whose decode steps read a share of the context.

    model = headrace.sparse.enable(model)
    model.generate(**inputs, past_key_values=PQCache(model.config, budget=0.1))

``update`` sees keys but no query, and the attention function a query but no cache. So a layer's ``update`` leaves itself with
the key tensor that it gives back, and the attention function takes it up from there, for that very tensor only. Every other
cache under the same attention implementation behaves as under "sdpa".
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from headrace.core.errors import InvalidRequest, UnsupportedModel
from headrace.core.retrieval import CROSSOVER
from headrace.sparse.codebook import Codes
from headrace.sparse.layer import PQLayer, PQSettings
from headrace.sparse.regions import Regions

NAME = "headrace_pq"

_pending = threading.local()


class _Layer(PQLayer):  # type: ignore[no-untyped-call]
    """A layer that tells the attention function of itself."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        _pending.layer, _pending.keys = (self, keys) if key_states.shape[2] == 1 else (None, None)
        return keys, values


class PQCache(Cache):
    """K and V of all tokens, and per layer an index of which a decode step reads the best share.

    Args:
        config: of the model; layers that are not full attention keep transformers' own cache.
        budget: share of the context that a step attends to, in (0, 1].
        codes: size of the sketch, as in "2x6" (sub-spaces x bits).
        initial, local_share, growing: see :class:`Regions`.
        iterations, refresh, residual, crossover, enough, stretch, seed: see :class:`PQSettings`.
        device_gib: what K and V of all layers may take on the model's device; the rest of a longer request lives in host memory.

    Raises:
        InvalidRequest: for an option out of range.
        UnsupportedModel: for a model whose layers keep something else than K and V.
    """

    def __init__(
        self,
        config: Any,
        budget: float = 0.1,
        *,
        codes: str = "2x6",
        initial: int = 32,
        local_share: float = 0.5,
        growing: bool = True,
        iterations: int = 8,
        refresh: float | None = 0.25,
        residual: bool = False,
        crossover: int = CROSSOVER,
        enough: float | None = None,
        stretch: float = 2.0,
        device_gib: float | None = None,
        seed: int = 0,
    ) -> None:
        config = config.get_text_config(decoder=True)
        self.settings = PQSettings(
            Regions(budget, initial, local_share, growing),
            Codes.parse(codes),
            iterations,
            refresh,
            residual,
            crossover,
            seed,
            enough=enough,
            stretch=stretch,
            device_bytes=None if device_gib is None else int(device_gib * (1 << 30) / config.num_hidden_layers),
        )
        _check_divides(config, self.settings.codes)
        types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        super().__init__(layers=[self._layer(kind, config) for kind in types])

    @property
    def device_bytes(self) -> int:
        """Bytes that searched layers hold on the model's device between steps: sketches, and K and V as far as they live there."""
        return sum(layer.device_bytes for layer in self.layers if isinstance(layer, PQLayer))

    def _layer(self, kind: str, config: Any) -> Any:
        if kind == "full_attention":
            return _Layer(self.settings)
        if kind == "sliding_attention" and getattr(config, "sliding_window", None):
            return DynamicSlidingWindowLayer(sliding_window=config.sliding_window)
        raise UnsupportedModel(
            f"a {kind} layer keeps no K and V that can be searched: use the model's own cache", field="model"
        )


def enable(model: Any) -> Any:
    """Make a transformers model attend through a :class:`PQCache` where it is given one; gives the model back."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    return model


def attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention by index for one token of a :class:`PQCache`, "sdpa" for everything else."""
    layer, keys = getattr(_pending, "layer", None), getattr(_pending, "keys", None)
    _pending.layer = _pending.keys = None
    if layer is None or keys is not key or query.shape[2] != 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return layer.attend(query, scale, _padding(attention_mask)).transpose(1, 2).contiguous(), None


def _padding(mask: Tensor | None) -> Tensor | None:
    """Tokens at the start of each sequence that [B, 1, 1, L] hides: int64[B]; None where it hides none."""
    if mask is None:
        return None
    seen = mask[:, 0, -1] if mask.dtype is torch.bool else mask[:, 0, -1] >= 0
    hidden = (~seen).sum(1)
    if not bool(hidden.any()):
        return None
    first = seen.long().argmax(1)
    if not torch.equal(first, hidden):
        raise InvalidRequest("the attention mask hides tokens in the middle: pad on the left", field="attention_mask")
    return first


def _check_divides(config: Any, codes: Codes) -> None:
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if size % codes.subspaces:
        raise InvalidRequest(
            f"codes have {codes.subspaces} sub-spaces, which do not divide the head size {size}: choose a divisor",
            field="codes",
        )


__all__ = ["NAME", "PQCache", "attention_forward", "enable"]
