"""Tiny random checkpoints of every supported family, so that tests need no download and no network.

Weights are drawn at a scale at which attention matters (a wrong mask changes the logits by far more than rounding), windows
are 16 tokens so that they bite within a short prompt, and everything is seeded: the same family is the same model everywhere.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from headrace.core.protocols import ModelCard

if TYPE_CHECKING:
    from headrace.models.loaded import LoadedModel

os.environ.setdefault("HF_HUB_OFFLINE", "1")

VOCAB = 512
CONTEXT = 512
WINDOW = 16
EOS, PAD, IM_START, IM_END = 0, 1, 2, 3
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "tie_word_embeddings": False,
}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}

_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    "llama3_rope": (
        "Llama",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"num_hidden_layers": 2}),
    "mistral": ("Mistral", {"sliding_window": WINDOW}),
    "gemma2": (
        "Gemma2",
        {
            "num_hidden_layers": 4,
            "tie_word_embeddings": True,
            "sliding_window": WINDOW,
            "layer_types": _MIXED,
            "attn_logit_softcapping": 4.0,
            "final_logit_softcapping": 8.0,
            "query_pre_attn_scalar": 24,
        },
    ),
    "gemma3": (
        "Gemma3Text",
        {
            "num_hidden_layers": 4,
            "tie_word_embeddings": True,
            "sliding_window": WINDOW,
            "layer_types": _MIXED,
            "query_pre_attn_scalar": 24,
        },
    ),
    "phi3": ("Phi3", {"sliding_window": None}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0], "tie_word_embeddings": True}),
    "qwen3_moe": ("Qwen3Moe", {**_EXPERTS, "norm_topk_prob": True}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "olmo2": ("Olmo2", {}),
    "granite": (
        "Granite",
        {
            "embedding_multiplier": 3.0,
            "logits_scaling": 4.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
            "tie_word_embeddings": True,
        },
    ),
    "gpt_oss": (
        "GptOss",
        {
            "num_hidden_layers": 4,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": WINDOW,
            "layer_types": _MIXED,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
}

FAMILIES: list[str] = list(_FAMILIES)


def config(family: str) -> Any:
    """The ``transformers`` configuration of ``family``."""
    import transformers

    prefix, changes = _FAMILIES[family]
    return getattr(transformers, f"{prefix}Config")(**{**_BASE, **changes})


def build(family: str, attention: str | None = None) -> Any:
    """A fresh float32 random model of ``family`` in evaluation mode, with transformers' ``attention`` ("eager", "sdpa")."""
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234 + FAMILIES.index(family))
        model = transformers.AutoModelForCausalLM.from_config(
            config(family), dtype=torch.float32, attn_implementation=attention
        ).eval()
        generator = torch.Generator().manual_seed(99 + FAMILIES.index(family))
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.dim() >= 2:
                    parameter.copy_(noise * 0.15)
                else:
                    parameter.add_(noise * 0.1)
        model.tie_weights()
    return model


def loaded(family: str, module: Any = None) -> LoadedModel:
    """A :class:`LoadedModel` of ``family`` (of ``module`` if given) that never was on disk."""
    from headrace.models.loaded import LoadedModel

    module = build(family) if module is None else module
    card = ModelCard(family, "", CONTEXT, VOCAB, (EOS, IM_END), dtype="float32", parameters=module.num_parameters())
    return LoadedModel(module, module.config, Path(), card, torch.float32, torch.device("cpu"))


@functools.cache
def model(family: str) -> Any:
    """The model of ``family``, built once per process: treat it as read only and leave its attention as you found it."""
    return build(family)


def checkpoint(family: str, path: str | Path) -> Path:
    """Write ``family`` as a checkpoint folder: config, safetensors, generation config and a tokenizer."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    built = build(family)
    built.config.dtype = torch.float32
    built.generation_config.eos_token_id = [EOS, IM_END]
    built.generation_config.pad_token_id = PAD
    built.save_pretrained(folder)
    tokenizer(folder)
    return folder


def tokenizer(path: str | Path) -> Path:
    """Write a byte-level BPE tokenizer of :data:`VOCAB` entries with a chat template to ``path``."""
    folder = Path(path)
    _bpe().save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|pad|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    return folder


@functools.cache
def _bpe() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_SENTENCES, trainer)
    spare = VOCAB - bpe.get_vocab_size()
    if spare:
        bpe.add_tokens([f"<|spare_{i}|>" for i in range(spare)])
    return bpe


_SENTENCES = [
    "A headrace is the channel that carries water to the wheel of a mill, and the tailrace carries it away again.",
    "The quick brown fox jumps over the lazy dog while the five boxing wizards jump quickly.",
    "def add(left, right):\n    return left + right\n\nfor index in range(10):\n    print(add(index, index))\n",
    'A schema says what an answer must look like: {"name": "string", "age": 3, "tags": ["one", "two"], "ok": true}.',
    "Counting: one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen.",
    "When the river rises the miller lowers the sluice, and when the river falls the miller raises it.",
    "Die Mühle am Bach klappert bei Tag und bei Nacht; l'eau coule vers la roue; 水は流れる。 Привет, мир! 🙂",
] * 4
