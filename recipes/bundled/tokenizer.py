"""A byte-level BPE tokenizer of a few thousand entries, with a chat template.

Digits are split one by one (arithmetic stays regular) and runs of blanks are kept whole up to the merges' limit, so
that indented code stays short.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT, PAD, SYSTEM, USER, ASSISTANT, END = (
    "<|endoftext|>",
    "<|pad|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
)
SPECIAL = (END_OF_TEXT, PAD, SYSTEM, USER, ASSISTANT, END)
SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\n+|[ \t]+(?=\n)|[ \t]+(?!\S)|[ \t]+|\s+"

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}"
    "{{ raise_exception('roles are system, user and assistant') }}"
    "{%- endif -%}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>\n' }}{%- endif -%}"
)


def render(messages: Iterable[tuple[str, str]]) -> str:
    """A conversation of (role, content) as training text: what the chat template makes of it."""
    return "".join(f"<|{role}|>\n{content}<|end|>\n" for role, content in messages)


def sample(texts: dict[str, list[str]], limit_bytes: int) -> Iterator[str]:
    """Up to an equal share of `limit_bytes` from every source, spread over its documents."""
    share = limit_bytes // max(1, len(texts))
    for documents in texts.values():
        total = sum(map(len, documents))
        keep = min(1.0, share / max(1, total))
        for document in documents:
            yield document[: max(1, int(len(document) * keep))]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn the merges; the special tokens take the first ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Ids of the tokens the configs name."""
    names = {"bos": END_OF_TEXT, "eos": END_OF_TEXT, "pad": PAD, "end": END}
    vocabulary = tokenizer.get_vocab()
    return {key: vocabulary[token] for key, token in names.items()}


def save(tokenizer: Tokenizer, folder: Path, positions: int = 2048) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` as transformers reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": positions,
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": PAD,
        "additional_special_tokens": [SYSTEM, USER, ASSISTANT, END],
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
