"""Rotary positions that depend on the length in use, made independent of what else is in the batch.

Two rotary variants choose their frequencies from the longest position in a forward pass. In a packed batch that would let
a neighbour's length change a sequence's K and V, and cached K would disagree with K computed later. So the choice is made
once, when the model loads:

* ``longrope`` (Phi-3 128k) takes its long frequencies when the model may be used beyond its original context, else its short ones. A
  prompt shorter than the original context is exact only when ``max_context`` says that none is longer.
* ``dynamic`` (NTK) rescales with every length beyond the original context, so the context ends there.
"""

from __future__ import annotations

from typing import Any

from headrace.core.errors import InvalidRequest, UnsupportedModel


def settle(module: Any, max_context: int | None = None) -> int:
    """Fix ``module``'s rotary frequencies for contexts of up to ``max_context`` tokens (None: all it was made for).

    Returns:
        The longest context in tokens.

    Raises:
        InvalidRequest: ``max_context`` is longer than the model's own.
        UnsupportedModel: layers differ in such a variant.
    """
    config = module.config
    longest = int(getattr(config, "max_position_embeddings", 0) or 1 << 30)
    parameters = getattr(config, "rope_parameters", None) or {}
    for name, part in parameters.items():
        if isinstance(part, dict) and any(word in str(part.get("rope_type")) for word in ("dynamic", "longrope")):
            raise UnsupportedModel(
                f"rotary positions of type {part['rope_type']} on only some layers ({name}) are not supported: "
                "serve it with plain transformers instead",
                field="model",
            )
    kind = str(parameters.get("rope_type", ""))
    original = int(parameters.get("original_max_position_embeddings") or longest)
    if "dynamic" in kind:
        longest = min(longest, original)
    if max_context is not None and max_context > longest:
        raise InvalidRequest(
            f"max_context is {max_context}, but this model was made for {longest} tokens: lower it", field="max_context"
        )
    context = max_context or longest
    if kind == "longrope":
        _settle_longrope(module, long=context > original, original=original)
    return context


def _settle_longrope(module: Any, *, long: bool, original: int) -> None:
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for part in module.modules():
        if getattr(part, "rope_type", None) != "longrope":
            continue
        device = part.inv_freq.device
        length = original + 1 if long else original
        chosen, _ = ROPE_INIT_FUNCTIONS["longrope"](part.config, device, seq_len=length)
        with torch.no_grad():
            part.inv_freq.copy_(chosen)
        part.rope_type = "default"  # from here on the frequencies above are used whatever the batch
