"""A Llama with weights set by hand that looks facts up and copies what follows them, exactly, at any length.

Two layers, after the induction heads of Elhage et al. (2021):

1. Heads that attend 1, 2 and 3 tokens back, by rotary position alone, write those tokens' codes into fields of their own.
2. A *copying* head looks for the place whose three tokens before it are the three newest here, and passes on the token there.
   A *lookup* head looks for the place that follows the two newest tokens after a "define" token; it overrules the copying head, and
   attends to the first token, which says nothing, where there is no such place.

So "SET a b c ... ." is looked up after "a b" and read on to its end, chains of variables are followed hop by hop, and a question is
repeated from its marker. Every head's attention is sharp: what a selector misses is lost, and nothing else matters.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headrace.bench.pqcache.tasks import Language

CODE = 32
"""Dimensions of a token's code."""

HEAD, GROUP = 128, 4
ROTARY = 1e24
"""Base of the rotary frequencies: pair i turns by 10^(-3 i / 8) a token, so pairs from 16 on stay put over a million tokens."""

PLACE_PAIRS = 15
"""Pairs whose rotation tells how far back a token is; the one after them carries the first token's mark."""

PLACE = 40.0
NEWEST, OLDER = 320.0, 40.0
"""Weights of matches in the copying head: the newest token decides, and older ones between equals."""

LOOKUP, SHARE = 100.0, 2.75
"""Weight of a match in the lookup head, and how many matches the first token counts as: three win, two and a half do not."""

# Fields of the residual stream, CODE dimensions each, and two marks.
CONTENT, BACK, OUT = 0, (1, 2, 3), 4
CONSTANT, FIRST = 5 * CODE, 5 * CODE + 1
WIDTH = 192


def analytic_model(language: Language, vocabulary: int, context: int = 1 << 17) -> Any:
    """The model for a language, in float32: a ``LlamaForCausalLM`` of 4 query heads on one KV head.

    Args:
        vocabulary: number of token ids, above all of the language's.
        context: positions that the configuration promises.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=8, num_hidden_layers=2, num_attention_heads=GROUP,
        num_key_value_heads=1, head_dim=HEAD, max_position_embeddings=context, rms_norm_eps=1e-12, bos_token_id=language.start,
        eos_token_id=None, pad_token_id=None, tie_word_embeddings=False, attention_bias=False, mlp_bias=False,
        rope_parameters={"rope_type": "default", "rope_theta": ROTARY},
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to_empty(device="cpu").requires_grad_(False)
    model.train(False)
    # Buffers of a meta module hold nothing: let the rotary embedding compute its own again.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    codes = torch.from_numpy(token_codes(vocabulary)).clone()
    codes[language.start] = 0.0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        embedding = model.model.embed_tokens.weight
        embedding[:, :CODE] = codes
        embedding[:, CONSTANT] = 1.0
        embedding[language.start, FIRST] = 1.0
        model.lm_head.weight[:, OUT * CODE : (OUT + 1) * CODE] = codes
        for norm in (model.model.norm, *(layer.input_layernorm for layer in model.model.layers)):
            norm.weight.fill_(1.0)
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight.fill_(1.0)
        _look_back(model.model.layers[0].self_attn)
        _retrieve(model.model.layers[1].self_attn, codes[language.define])
    return model


@functools.lru_cache(maxsize=4)
def token_codes(count: int) -> Any:
    """float32[count, CODE] of plus and minus 1 / sqrt(CODE), no two with a product above about a half; the same every time."""
    rng = np.random.default_rng(7)
    limit = 14 if count <= 1500 else 18
    kept, found = np.empty((count, CODE), np.float32), 0
    while found < count:
        drawn = rng.integers(0, 2, (512, CODE)).astype(np.float32) * 2 - 1
        for code in drawn[(drawn @ kept[:found].T).max(1, initial=-CODE) <= limit]:
            if found < count and (kept[:found] @ code).max(initial=-CODE) <= limit:
                kept[found] = code
                found += 1
    return kept / np.float32(CODE**0.5)


def _rms(ones: float) -> float:
    """What RMSNorm divides by where the residual stream holds vectors of summed squared length ``ones``."""
    return float((ones / WIDTH) ** 0.5)


def _look_back(attention: Any) -> None:
    """Layer 1: query head h attends h + 1 tokens back (the fourth as the first, unread), and hands on the code found."""
    scale, rms = HEAD**0.5, _rms(2.0)
    pairs = torch.arange(PLACE_PAIRS)
    angles = torch.tensor(ROTARY) ** (-2.0 * pairs / HEAD)
    size = (PLACE * scale) ** 0.5 * rms
    attention.k_proj.weight[pairs, CONSTANT] = size
    for head in range(GROUP):
        back = head % 3 + 1
        # A key turned back by as many tokens: the product peaks where the two differ by just that.
        attention.q_proj.weight[head * HEAD + pairs, CONSTANT] = size * torch.cos(back * angles)
        attention.q_proj.weight[head * HEAD + HEAD // 2 + pairs, CONSTANT] = -size * torch.sin(back * angles)
    identity = torch.eye(CODE)
    attention.v_proj.weight[:CODE, :CODE] = identity * rms
    for head, field in enumerate(BACK):
        attention.o_proj.weight[field * CODE : (field + 1) * CODE, head * HEAD : head * HEAD + CODE] = identity


def _retrieve(attention: Any, define: Tensor) -> None:
    """Layer 2: heads 0 and 1 copy, 2 and 3 look up, each pair alike."""
    scale, rms = HEAD**0.5, _rms(5.0)
    identity = torch.eye(CODE)
    for place, field in enumerate(BACK):
        attention.k_proj.weight[_dims(place), field * CODE : (field + 1) * CODE] = identity * rms
    attention.k_proj.weight[PLACE_PAIRS, FIRST] = _rms(2.0)  # the first token has no codes in any field
    attention.v_proj.weight[:CODE, :CODE] = identity * rms
    for head in range(GROUP):
        copies = head < 2
        weights = (NEWEST, OLDER, OLDER) if copies else (LOOKUP, LOOKUP, LOOKUP)
        for place, weight in enumerate(weights):
            rows = head * HEAD + _dims(place)
            if place == 2 and not copies:
                attention.q_proj.weight[rows, CONSTANT] = define * weight * scale * rms
            else:
                field = place  # the token here is field 0, the ones before it fields 1 and 2
                attention.q_proj.weight[rows, field * CODE : (field + 1) * CODE] = identity * weight * scale * rms
        if not copies:
            attention.q_proj.weight[head * HEAD + PLACE_PAIRS, CONSTANT] = LOOKUP * SHARE * scale * rms
        columns = slice(head * HEAD, head * HEAD + CODE)
        attention.o_proj.weight[OUT * CODE : (OUT + 1) * CODE, columns] = identity * (0.5 if copies else 1.5)


def _dims(place: int) -> Tensor:
    """Dimensions of a head that hold a field's code: both halves of 16 rotary pairs that do not turn."""
    pairs = 16 + 16 * place + torch.arange(16)
    return torch.cat([pairs, pairs + HEAD // 2])
