"""Which models run here, decided by capability where possible, and how a family's module is taken apart.

A model is supported when its class looks attention up through transformers' attention interface and nothing else in it keeps state
between steps. What is not supported is refused before any weight is read, by name, with the reason and an alternative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from headrace.core.errors import UnsupportedModel

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

_ATTENTION_LAYERS = {"full_attention", "sliding_attention"}


def check_supported(config: Any, *, text: Any = None) -> Any:
    """The ``*ForCausalLM`` class that runs ``config``.

    Args:
        config: the checkpoint's configuration.
        text: its text part where it has one of its own.

    Raises:
        UnsupportedModel: naming the architecture, the reason and an alternative.
    """
    text = config if text is None else text
    kind = config.model_type
    for name in (kind, text.model_type):
        if name in _REFUSED:
            _refuse(name, *_REFUSED[name])
    if getattr(config, "is_encoder_decoder", False):
        _refuse(kind, "it is an encoder-decoder", f"use a decoder-only model, or {_PLAIN}")
    if text is not config:
        _refuse(
            kind, "it is multi-modal, and only text models are served", "use the text-only checkpoint of the family"
        )
    if getattr(config, "kv_lora_rank", None):
        _refuse(
            kind, "its multi-head latent attention keeps compressed K and V", f"use a grouped-query model, or {_PLAIN}"
        )
    if getattr(config, "alibi", False):
        _refuse(kind, *_REFUSED["bloom"])
    if getattr(config, "add_cross_attention", False):
        _refuse(kind, "it attends across to an encoder", f"use a decoder-only model, or {_PLAIN}")
    if hasattr(config, "type_vocab_size") and not getattr(config, "is_decoder", False):
        _refuse(
            kind, "it is an encoder, which sees the whole text at once", "use a decoder-only model to generate text"
        )
    if getattr(config, "use_bidirectional_attention", False):
        _refuse(kind, "its tokens also attend to later ones, so it cannot generate", "use it for embeddings elsewhere")
    odd = sorted(set(getattr(config, "layer_types", None) or ()) - _ATTENTION_LAYERS)
    if odd:
        _refuse(kind, f"it has layers of type {', '.join(odd)}, and only full and sliding attention run here", _PLAIN)
    window = getattr(config, "sliding_window", None)
    if window and window < getattr(config, "max_position_embeddings", window) and kind not in STACKED:
        _refuse(
            kind, f"its attention window of {window} tokens is not known to be handed to the attention function", _PLAIN
        )
    return _causal_class(config)


def _causal_class(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    kind = config.model_type
    try:
        found = AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        _refuse(kind, "transformers has no causal language model of this type", "use a text-generation checkpoint")
    model: Any = found[0] if isinstance(found, Sequence) else found
    if not getattr(model, "_supports_attention_backend", False):
        _refuse(kind, f"{model.__name__} computes attention itself and not through the attention interface", _PLAIN)
    return model


def _refuse(name: str, reason: str, alternative: str) -> Any:
    raise UnsupportedModel(f"{name} models are not supported: {reason}. Instead, {alternative}.", field="model")


@dataclass(frozen=True, slots=True)
class Anatomy:
    """The parts of a decoder.

    Attributes:
        embed, layers, norm, head: the modules, in the order they run.
        rotary: the module that turns positions into cosines and sines, or None.
        embed_scale: factor on the embeddings, None for one the embedding module applies itself or none at all.
        logit_scale: factor on the logits, or None.
        logit_softcap: logits become ``cap * tanh(logits / cap)``, or None.
    """

    embed: Any
    layers: Any
    norm: Any
    head: Any
    rotary: Any
    embed_scale: float | None = None
    logit_scale: float | None = None
    logit_softcap: float | None = None


# Model types taken apart by :func:`anatomy`: their modules follow Llama's names, model.{embed_tokens, layers, norm, rotary_emb}
# and lm_head. Every one is tested against its whole forward; any other supported model runs whole, after a self-check at load.
_STACKED = (
    "apertus arcee bitnet cohere cohere2 ernie4_5 ernie4_5_moe exaone4 flex_olmo gemma gemma2 gemma3_text glm "
    "glm4 glm4_moe gpt_oss granite granitemoe granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe llama "
    "minimax_m2 ministral ministral3 mistral mixtral olmo olmo2 olmo3 phi3 qwen2 qwen2_moe qwen3 qwen3_moe "
    "seed_oss smollm3 starcoder2 vaultgemma"
)
STACKED = frozenset(_STACKED.split())


def anatomy(module: Any) -> Anatomy | None:
    """How ``module`` is taken apart, or None for a family outside the table."""
    config = module.config
    if config.model_type not in STACKED:
        return None
    base = module.model
    divide = getattr(config, "logits_scaling", None)
    scale = getattr(module, "logit_scale", None) if divide is None else 1.0 / divide
    return Anatomy(
        embed=base.embed_tokens,
        layers=base.layers,
        norm=base.norm,
        head=module.lm_head,
        rotary=base.rotary_emb,
        embed_scale=getattr(base, "embedding_multiplier", None),
        logit_scale=scale,
        logit_softcap=getattr(config, "final_logit_softcapping", None),
    )


def layer_types(config: Any, depth: int) -> tuple[str, ...]:
    """Per layer "full_attention" or "sliding_attention"; all full where the configuration does not say."""
    return tuple(getattr(config, "layer_types", None) or ["full_attention"] * depth)


def kv_shape(config: Any) -> tuple[int, int, int]:
    """(layers, K and V heads, head size) of ``config``: what one slot holds."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return config.num_hidden_layers, kv_heads, size
