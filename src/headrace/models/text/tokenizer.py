"""Text to token ids and back, chat templates included, over a checkpoint's own tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headrace.core.errors import BrokenCheckpoint, InvalidRequest, UnsupportedModel
from headrace.models.text.detokenizer import BytesDecoder, IncrementalDecoder, Pieces, WindowDecoder, byte_pieces

_TEMPLATE_ARGUMENTS = {
    "chat_template", "conversation", "max_length", "messages", "padding", "return_assistant_tokens_mask", "return_dict",
    "return_tensors", "tokenize", "tokenizer_kwargs", "truncation",
}  # fmt: skip


class Tokenizer:
    """The tokenizer of a checkpoint; safe to use from several threads.

    Args:
        path: the checkpoint's folder.
        chat_template: a Jinja template, or a file that holds one, in place of the checkpoint's own.
        trust_remote_code: run tokenizer code that comes with the checkpoint.

    Attributes:
        hf: the ``transformers`` tokenizer underneath.
        vocab_size: one more than the largest id.
        eos_ids: ids that end a generation according to the generation config (or the model config) and the tokenizer, ascending.
        special_ids: ids of tokens that are markup rather than text.

    Raises:
        BrokenCheckpoint: the folder holds no readable tokenizer.
        UnsupportedModel: the tokenizer has no ``tokenizers`` backend.
        InvalidRequest: ``chat_template`` is neither a template nor a file.
    """

    def __init__(self, path: str | Path, *, chat_template: str | None = None, trust_remote_code: bool = False) -> None:
        self.path = Path(path)
        self.hf: Any = _load(self.path, trust_remote_code)
        if chat_template is not None:
            self.hf.chat_template = _template_text(chat_template)
        self._backend = self.hf.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self.vocab_size: int = max(self.vocabulary.values(), default=-1) + 1
        added = self._backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token for token, text in added.items() if text.special)
        self.eos_ids: tuple[int, ...] = _eos_ids(self.path, self.hf.eos_token_id)
        self._pieces: Pieces | None = byte_pieces(self._backend)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of ``text``; markup such as ``<|end|>`` inside it becomes the special token, as in ``transformers``.

        Raises:
            InvalidRequest: the text holds a lone surrogate, which no UTF-8 text can.
        """
        try:
            ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError:  # how the backend reports a string it cannot read as UTF-8
            _require_unicode(text)
            raise
        return ids

    def chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **template_kwargs: Any
    ) -> list[int]:
        """Ids of a conversation, laid out by the model's chat template in ``transformers``' sandbox.

        Args:
            messages: role and content each, as in OpenAI's API; content in parts must be text.
            add_generation_prompt: open the assistant's turn at the end.
            template_kwargs: passed to the template (``tools``, ``enable_thinking``, ...).

        Raises:
            InvalidRequest: no template, or the template refuses the messages.
        """
        return self.encode(self.render(messages, add_generation_prompt, template_kwargs), add_special_tokens=False)

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, template_kwargs: Mapping[str, Any]
    ) -> str:
        """The text behind :meth:`chat`."""
        if not self.hf.chat_template:
            raise InvalidRequest(
                "this model has no chat template: use /v1/completions, or start the server with --chat-template FILE",
                field="messages",
            )
        reserved = sorted(_TEMPLATE_ARGUMENTS & template_kwargs.keys())
        if reserved:
            raise InvalidRequest(
                f"chat_template_kwargs may not set {', '.join(reserved)}: these belong to the server",
                field="chat_template_kwargs",
            )
        plain = [_with_text_content(message, place) for place, message in enumerate(messages)]
        try:
            text: str = self.hf.apply_chat_template(
                plain, tokenize=False, add_generation_prompt=add_generation_prompt, **template_kwargs
            )
        except Exception as error:  # the template is data that came with the model: it may raise anything
            raise InvalidRequest(
                f"the model's chat template refused the messages: {error or type(error).__name__}", field="messages"
            ) from error
        return text

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ``ids``; ids outside the vocabulary have none."""
        decoder = self.stream(skip_special_tokens)
        return decoder.push(ids) + decoder.flush()

    def stream(self, skip_special_tokens: bool = True, *, continues: bool = False) -> IncrementalDecoder:
        """A decoder for one growing sequence.

        Args:
            skip_special_tokens: leave special tokens out of the text.
            continues: the text follows a prompt, so a sentencepiece vocabulary's leading space is part of it.
        """
        hidden = self.special_ids if skip_special_tokens else frozenset()
        if self._pieces is not None:
            return BytesDecoder(self._pieces, hidden, strip="" if continues else self._pieces.strip)
        return WindowDecoder(self._decode_whole, hidden)

    def _decode_whole(self, ids: list[int]) -> str:
        text: str = self._backend.decode(ids, skip_special_tokens=False)
        return text

    def token_bytes(self, token: int) -> bytes:
        """Bytes of a token on its own: possibly part of a character; empty outside the vocabulary."""
        if self._pieces is not None:
            return self._pieces[token]
        return self._decode_whole([token]).encode()

    def token_text(self, token: int) -> str:
        """Text of a token on its own, special tokens included; partial characters become U+FFFD."""
        return self.token_bytes(token).decode(errors="replace")

    @property
    def vocabulary(self) -> dict[str, int]:
        """Spelling to id, added tokens included (a copy)."""
        vocabulary: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        return vocabulary


def check_same_vocabulary(target: Tokenizer, draft: Tokenizer) -> None:
    """Raise :class:`UnsupportedModel` unless both give every id the same meaning, naming the first that differs."""
    mine, other = target.vocabulary, draft.vocabulary
    if mine == other:
        return
    token, spelling = min((place, text) for text, place in mine.items() ^ other.items())
    raise UnsupportedModel(
        f"the draft's vocabulary differs from the target's ({len(other)} and {len(mine)} tokens, first at id {token}, "
        f"{spelling!r}): a draft must share the target's tokenizer; choose one of the same model family",
        field="draft",
    )


def _load(path: Path, trust_remote_code: bool) -> Any:
    if not path.is_dir():
        raise BrokenCheckpoint(f"no tokenizer: {path} is not a folder", field="model")
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # readers of untrusted files raise anything
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise BrokenCheckpoint(
            f"the tokenizer in {path} cannot be read ({reason[0]}): the folder needs an intact tokenizer.json "
            "(tokenizer_config.json and chat_template.jinja beside it)",
            field="model",
        ) from error
    if not getattr(loaded, "is_fast", False):
        raise UnsupportedModel(
            f"the tokenizer in {path} ({type(loaded).__name__}) has no tokenizer.json and cannot be converted to one: "
            "convert it with transformers' save_pretrained, or choose a checkpoint that has it",
            field="model",
        )
    return loaded


def _require_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"the text is not valid Unicode (lone surrogate at character {error.start}): send whole characters"
        ) from None


def _template_text(source: str) -> str:
    if "{" in source:
        return source
    try:
        return Path(source).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(
            f"chat template {source!r} cannot be read ({error}): give a Jinja template or a file with one",
            field="chat_template",
        ) from None


def _eos_ids(path: Path, own: int | None) -> tuple[int, ...]:
    found = {own} if own is not None else set()
    for name in ("generation_config.json", "config.json"):
        listed = _read_json(path / name).get("eos_token_id")
        if listed is not None:
            found.update(listed if isinstance(listed, list) else [listed])
            break
    return tuple(sorted(found))


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BrokenCheckpoint(f"{path} cannot be read ({error}): restore the file", field="model") from None
    return content if isinstance(content, dict) else {}


def _with_text_content(message: Mapping[str, Any], place: int) -> dict[str, Any]:
    """The message with content in parts joined to one string; most templates know strings only."""
    content = message.get("content")
    if not isinstance(content, list | tuple):
        return dict(message)
    texts = []
    for number, part in enumerate(content):
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise InvalidRequest(
                f"messages[{place}].content[{number}] is of type {kind!r}: this model reads text parts only",
                field=f"messages[{place}].content[{number}]",
            )
        texts.append(part["text"])
    return {**message, "content": "".join(texts)}
