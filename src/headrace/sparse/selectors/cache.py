"""Selectors under transformers' ``generate``: a cache whose decode steps attend to what a selector names."""

from __future__ import annotations

import threading
from typing import Any

from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from headrace.core.errors import InvalidRequest, UnsupportedModel
from headrace.sparse.layer import PQLayer, PQSettings
from headrace.sparse.regions import Regions
from headrace.sparse.selectors.base import Place
from headrace.sparse.selectors.registry import make
from headrace.sparse.selectors.step import SelectedAttention

NAME = "headrace_selected"

_pending = threading.local()


class SelectedLayer(PQLayer):  # type: ignore[no-untyped-call]
    """Stores K and V as :class:`PQLayer` does, and lets a selector say what a step reads; kept for comparisons, so it only grows."""

    def __init__(self, attention: SelectedAttention) -> None:
        super().__init__(PQSettings(attention.regions, compiled=False))
        self.attention = attention

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        _pending.layer, _pending.keys = self, keys
        return keys, values

    def read(self, query: Tensor, scale: float) -> None:
        """Show the selector the queries [B, Hq, n, D] of tokens that attend exactly."""
        grouped, keys, _ = self._rows_of(query)
        self.attention.read(grouped, keys, scale)

    def attend(self, query: Tensor, scale: float, padding: Tensor | None = None) -> Tensor:
        """Attention of the newest token: [B, Hq, 1, D] to the same."""
        if padding is not None:
            raise InvalidRequest("selectors compare contexts of one length: give no padding", field="attention_mask")
        grouped, keys, values = self._rows_of(query)
        return self.attention.step(grouped[:, :, 0], keys, values, scale).output.to(query.dtype).view(query.shape)

    def _rows_of(self, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, _, count, size = query.shape
        grouped = query.reshape(batch * self.keys.shape[1], -1, count, size)
        keys, values = (part[:, :, : self.length].flatten(0, 1) for part in (self.keys, self.values))
        return grouped, keys, values

    def crop(self, tokens: int) -> None:
        raise InvalidRequest("selectors that drop tokens cannot take a context back: use no drafts", field="cache")

    def _take(self, chosen: Tensor) -> None:
        raise InvalidRequest("selectors keep the sequences they began with: use no beams", field="cache")


class SelectedCache(Cache):
    """K and V of all tokens of a model of full attention, of which a decode step reads what a selector names.

    Args:
        config: of the model.
        selector: a name of :data:`headrace.sparse.selectors.SELECTORS`.
        regions: the budget.
        options: of the selector.

    Raises:
        InvalidRequest: no such selector.
        UnsupportedModel: a layer is not full attention.
    """

    def __init__(self, config: Any, selector: str, regions: Regions, **options: Any) -> None:
        config = config.get_text_config(decoder=True)
        for kind in getattr(config, "layer_types", None) or []:
            if kind != "full_attention":
                raise UnsupportedModel(f"a {kind} layer has nothing to select from", field="model")
        layers = config.num_hidden_layers
        super().__init__(
            layers=[
                SelectedLayer(SelectedAttention(make(selector, Place(layer, layers), **options), regions))
                for layer in range(layers)
            ]
        )


def enable_selected(model: Any) -> Any:
    """Make a transformers model attend through a :class:`SelectedCache` where it is given one; gives the model back."""
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
    """Chosen tokens for one token of a :class:`SelectedCache`, "sdpa" for everything else; prompts are shown to the selector."""
    layer, keys = getattr(_pending, "layer", None), getattr(_pending, "keys", None)
    _pending.layer = _pending.keys = None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if layer is None or keys is not key:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if query.shape[2] == 1:
        return layer.attend(query, scale).transpose(1, 2).contiguous(), None
    layer.read(query, scale)
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


__all__ = ["NAME", "SelectedCache", "SelectedLayer", "attention_forward", "enable_selected"]
