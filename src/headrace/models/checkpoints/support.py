"""What runs here and what is refused, decided by capability where possible and before any weight is read.

A model is supported when its class looks attention up through transformers' attention interface and nothing else in it keeps
state between steps. What is not supported is refused by name, with the reason and an alternative.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from headrace.core.errors import UnsupportedModel
from headrace.models.families import STACKED

_STATE = "it carries a recurrent state that cannot be branched, shared or dropped per token as K and V can"
_PLAIN = "serve it with plain transformers"

# Families refused by name, as (model types, reason, alternative). What the configuration itself gives away is checked below.
_REFUSALS: tuple[tuple[str, str, str], ...] = (
    (
        "mamba mamba2 falcon_mamba rwkv xlstm jamba zamba zamba2 bamba falcon_h1 nemotron_h granitemoehybrid plamo2",
        f"it is a state-space or recurrent model: {_STATE}",
        "use an attention-only model of the same size, such as Qwen3 or Llama",
    ),
    (
        "recurrent_gemma lfm2 lfm2_moe lfm3 qwen3_next qwen3_5 qwen3_5_text qwen3_5_moe qwen3_5_moe_text "
        "kimi_linear minimax olmo_hybrid bailing_hybrid",
        f"it mixes attention with linear attention, recurrences or convolutions: {_STATE}",
        f"use an attention-only model, or {_PLAIN}",
    ),
    (
        "bloom mpt",
        "it uses ALiBi position biases, which the attention kernels here do not add",
        f"use a model with rotary positions, or {_PLAIN}",
    ),
    (
        "gemma3n gemma3n_text gemma4 gemma4_text gemma4_unified gemma4_unified_text",
        "some of its layers read the K and V of other layers, or take a second input per layer",
        "use Gemma 3 instead",
    ),
    (
        "llama4 llama4_text",
        "its chunked attention is not implemented",
        f"use Llama 3, or {_PLAIN}",
    ),
    (
        "doge",
        "its attention mask depends on its values",
        f"use a model with plain attention, or {_PLAIN}",
    ),
    (
        "mllama mllama_text_model",
        "it attends across to image features",
        "use the text-only Llama 3 of the same size",
    ),
)
_REFUSED = {name: (reason, instead) for names, reason, instead in _REFUSALS for name in names.split()}


# Multi-modal types whose text part is an ordinary decoder of its own, loaded without the rest, and where its tensors are found.
_TEXT_PARTS = frozenset({"gemma3", "llava", "mistral3"})
TEXT_KEYS = {r"^(model\.language_model|language_model\.model)\.": "model.", r"^language_model\.lm_head\.": "lm_head."}

_ATTENTION_LAYERS = {"full_attention", "sliding_attention"}


def check_supported(config: Any, remote: str | None = None) -> tuple[Any, Any]:
    """The ``*ForCausalLM`` class that runs a checkpoint, and the configuration to run it with.

    Args:
        config: the checkpoint's configuration.
        remote: folder of the checkpoint when Python code that comes with it may run.

    Returns:
        The class and ``config`` itself, or the text part of it where only that part is loaded (its tensors then have to be renamed
        by :data:`TEXT_KEYS`).

    Raises:
        UnsupportedModel: naming the architecture, the reason and an alternative.
    """
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        _refuse(kind, "it is an encoder-decoder", f"use a decoder-only model, or {_PLAIN}")
    text = config.get_text_config(decoder=True)
    for name in (kind, text.model_type):
        if name in _REFUSED:
            _refuse(name, *_REFUSED[name])
    if text is not config and not (kind in _TEXT_PARTS and text.model_type in STACKED):
        _refuse(kind, "it is multi-modal, and only text models are served", "use the family's text-only checkpoint")
    _check_attention(text)
    return _causal_class(text, remote), text


def _check_attention(config: Any) -> None:
    """Refuse what the configuration says about attention and the kernels cannot do."""
    kind = config.model_type
    if getattr(config, "kv_lora_rank", None):
        reason = "its multi-head latent attention keeps compressed K and V"
        _refuse(kind, reason, f"use a grouped-query model, or {_PLAIN}")
    if getattr(config, "alibi", False):
        _refuse(kind, *_REFUSED["bloom"])
    if getattr(config, "add_cross_attention", False):
        _refuse(kind, "it attends across to an encoder", f"use a decoder-only model, or {_PLAIN}")
    if hasattr(config, "type_vocab_size") and not getattr(config, "is_decoder", False):
        _refuse(kind, "it is an encoder, which sees the whole text at once", "use a decoder-only model")
    if getattr(config, "use_bidirectional_attention", False):
        _refuse(kind, "its tokens also attend to later ones, so it cannot generate", "use a decoder-only model")
    odd = sorted(set(getattr(config, "layer_types", None) or ()) - _ATTENTION_LAYERS)
    if odd:
        _refuse(kind, f"it has layers of type {', '.join(odd)}, and only full and sliding attention run here", _PLAIN)
    window = getattr(config, "sliding_window", None)
    if window and window < getattr(config, "max_position_embeddings", window) and kind not in STACKED:
        _refuse(kind, f"its attention window of {window} tokens may not reach the attention function", _PLAIN)


def _causal_class(config: Any, remote: str | None) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    kind = config.model_type
    own = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    if remote is not None and own is not None:
        model: Any = get_class_from_dynamic_module(own, remote, local_files_only=True)
    else:
        try:
            found = AutoModelForCausalLM._model_mapping[type(config)]
        except KeyError:
            _refuse(kind, "transformers has no causal language model of this type", "use a text-generation checkpoint")
        model = found[0] if isinstance(found, Sequence) else found
    if not getattr(model, "_supports_attention_backend", False):
        _refuse(kind, f"{model.__name__} computes attention itself and not through the attention interface", _PLAIN)
    return model


def _refuse(name: str, reason: str, alternative: str) -> NoReturn:
    raise UnsupportedModel(f"{name} models are not supported: {reason}. Instead, {alternative}.", field="model")
