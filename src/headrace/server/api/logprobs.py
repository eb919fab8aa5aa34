"""Log-probabilities in OpenAI's two shapes."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from headrace.core.outputs import TokenLogprobs

if TYPE_CHECKING:
    from headrace.models.text.tokenizer import Tokenizer

LOWEST = -9999.0
"""Stands for minus infinity, which JSON cannot write; OpenAI's API uses this number."""


def chat_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """``logprobs`` of a chat choice: one entry per token, end-of-text included, with its bytes and alternatives."""
    content = []
    for entry in entries:
        item = _alternative(tokenizer, entry.token, entry.logprob)
        item["top_logprobs"] = [_alternative(tokenizer, token, value) for token, value in entry.top]
        content.append(item)
    return {"content": content, "refusal": None}


def _alternative(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    piece = tokenizer.token_bytes(token)
    return {"token": piece.decode(errors="replace"), "logprob": max(logprob, LOWEST), "bytes": list(piece)}


class CompletionLogprobs:
    """``logprobs`` of a text completion: four parallel lists per call, over one growing text.

    Args:
        tokenizer: the model's.
        offset: characters that stand before the first token (an echoed prompt).
    """

    def __init__(self, tokenizer: Tokenizer, offset: int) -> None:
        self._tokenizer, self._offset = tokenizer, offset
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def render(self, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """The lists for the next tokens.

        The chosen token is always among its ``top_logprobs``, even when it is not one of the most likely. A token that
        begins inside a character has the offset of that character.
        """
        texts, tops, offsets = [], [], []
        for entry in entries:
            text = self._distinct_text(entry.token)
            top = {self._distinct_text(token): max(value, LOWEST) for token, value in entry.top}
            top.setdefault(text, max(entry.logprob, LOWEST))
            texts.append(text)
            tops.append(top)
            offsets.append(self._offset)
            self._offset += len(self._utf8.decode(self._tokenizer.token_bytes(entry.token)))
        values = [max(entry.logprob, LOWEST) for entry in entries]
        return {"tokens": texts, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}

    def _distinct_text(self, token: int) -> str:
        """A token's text, or ``bytes:\\xe2\\x82`` for a part of a character, so that different tokens stay different keys."""
        piece = self._tokenizer.token_bytes(token)
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)
