"""How the module of each family is taken apart, and the shape of what one slot holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


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
    """How ``module`` is taken apart, or None for a family outside the table and for a class that is not transformers' own."""
    config = module.config
    if config.model_type not in STACKED or type(module).__module__.partition(".")[0] != "transformers":
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
