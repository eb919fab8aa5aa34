"""Small tokenizers of every kind a checkpoint may bring, as folders or as bare ``tokenizers`` objects."""

from __future__ import annotations

import json
from pathlib import Path

from tests import tiny
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

WORDS = ["the", "mill", "wheel", "water", "é", "水", "流", "a", "b", "ab", ".", ",", "!", "e", "o", "m", "i", "l"]


def byte_fallback(*, strip: bool = True) -> Tokenizer:
    """A sentencepiece-like BPE: words carry a leading space, unknown characters fall back to byte tokens (Llama's layout)."""
    spellings = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    spellings += [mark + word for word in WORDS for mark in ("", "▁")]
    vocabulary = {text: place for place, text in enumerate(dict.fromkeys(spellings))}
    built = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    built.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    built.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    built.add_special_tokens(["<unk>", "<s>", "</s>"])
    built.add_tokens(["<tool call>"])
    return built


def wordpiece() -> Tokenizer:
    """BERT's layout: continuations carry ``##``."""
    spellings = ["[UNK]", "[CLS]", "[SEP]", *WORDS, *(f"##{word}" for word in WORDS)]
    built = Tokenizer(models.WordPiece({text: i for i, text in enumerate(spellings)}, unk_token="[UNK]"))
    built.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    built.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    built.add_special_tokens(["[UNK]", "[CLS]", "[SEP]"])
    return built


def metaspace() -> Tokenizer:
    """A sentencepiece unigram without byte fallback (T5's layout)."""
    spellings = ["<unk>", "</s>", "▁", *WORDS, *(f"▁{word}" for word in WORDS)]
    built = Tokenizer(models.Unigram([(text, -float(i)) for i, text in enumerate(spellings)], unk_id=0))
    built.pre_tokenizer = pre_tokenizers.Metaspace()
    built.decoder = decoders.Metaspace()
    built.add_special_tokens(["<unk>", "</s>"])
    return built


def suffixed() -> Tokenizer:
    """A BPE whose words end in ``</w>`` (GPT-1's layout): a token's space appears only when another follows."""
    spellings = ["<unk>", *WORDS, *(f"{word}</w>" for word in WORDS)]
    built = Tokenizer(models.BPE({text: i for i, text in enumerate(spellings)}, [], end_of_word_suffix="</w>"))
    built.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    built.decoder = decoders.BPEDecoder(suffix="</w>")
    built.add_special_tokens(["<unk>"])
    return built


def byte_level() -> Tokenizer:
    """The tiny checkpoints' own."""
    return tiny._bpe()


KINDS = {
    "byte_level": byte_level,
    "byte_fallback": byte_fallback,
    "byte_fallback_no_strip": lambda: byte_fallback(strip=False),
    "wordpiece": wordpiece,
    "metaspace": metaspace,
    "suffixed": suffixed,
}


def folder(kind: str, path: Path, **settings: object) -> Path:
    """Write tokenizer ``kind`` to ``path`` with ``settings`` in its configuration."""
    path.mkdir(parents=True, exist_ok=True)
    KINDS[kind]().save(str(path / "tokenizer.json"))
    content = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **settings}
    (path / "tokenizer_config.json").write_text(json.dumps(content), encoding="utf-8")
    return path
