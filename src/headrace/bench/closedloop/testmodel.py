"""Models to measure with: a Llama of a known shape with random weights, in memory or as a checkpoint every engine can read.

What a step costs depends on the shape alone, so random weights measure speed as well as trained ones do.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from headrace.bench.checkpoints.shapes import shape_named
from headrace.core.cache import cache_folder

END, PAD = "<|end|>", "<|pad|>"


def random_llama(shape: str, seed: int = 0) -> Any:
    """A ``LlamaForCausalLM`` of the named shape in float32, evaluation mode; the same weights for the same seed.

    Raises:
        InvalidRequest: for an unknown shape.
    """
    sizes = shape_named(shape).config()
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(**sizes, max_position_embeddings=2048, bos_token_id=0, eos_token_id=0, pad_token_id=1)
    module: Any = LlamaForCausalLM(config)
    return module.eval()


def random_checkpoint(shape: str, seed: int = 0, folder: Path | None = None) -> Path:
    """The folder of such a model as safetensors with a tokenizer, written on first use.

    ``folder`` is a folder of the user's cache by default.
    """
    folder = folder or cache_folder("bench") / f"random-{shape}-{seed}"
    if not (folder / "complete").exists():
        module = random_llama(shape, seed)
        module.save_pretrained(folder)
        _write_tokenizer(folder, module.config.vocab_size)
        (folder / "complete").touch()
    return folder


def _write_tokenizer(folder: Path, size: int) -> None:
    """A byte-level BPE of ``size`` entries whose merges are pairs of bytes in order, which takes no text to make."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [END, PAD, *letters]
    merges = [(left, right) for left in letters for right in letters][: size - len(words)]
    words += [left + right for left, right in merges]
    bpe = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([END, PAD])
    bpe.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END, "pad_token": PAD,
        "unk_token": END, "model_max_length": 2048,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
