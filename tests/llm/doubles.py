"""An :class:`LLM` over the fake language model of the engine's tests: every answer is known beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from tests.engine import fake

from headrace.core.errors import InvalidRequest
from headrace.engine.engine import Engine
from headrace.llm import LLM

FIRST = 31
"""Token t is character t + FIRST; token 0 ends the text."""


class CharDecoder:
    """Text of a growing list of tokens, none of which is ever held back."""

    pending = False

    def push(self, ids: Sequence[int]) -> str:
        return "".join(chr(token + FIRST) for token in ids if token != fake.EOS)

    def flush(self) -> str:
        return ""


class CharTokenizer:
    """One token a character."""

    def __init__(self, path: str, *, trust_remote_code: bool = False) -> None:
        self.path = path

    def encode(self, text: str) -> list[int]:
        return [ord(char) - FIRST for char in text]

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        if any("content" not in message for message in messages):
            raise InvalidRequest("a message has no content", field="messages")
        return self.encode("".join(f"{m['role']}: {m['content']}" for m in messages))

    def stream(self, skip_special_tokens: bool = True, *, continues: bool = False) -> CharDecoder:
        return CharDecoder()

    def token_text(self, token: int) -> str:
        return CharDecoder().push([token])


def llm(monkeypatch: pytest.MonkeyPatch, **limits: int) -> tuple[LLM, Engine]:
    """An LLM and the engine inside it."""
    engine = fake.engine(**limits)
    monkeypatch.setattr("headrace.compose.build_engine", lambda config: engine)
    monkeypatch.setattr("headrace.models.text.tokenizer.Tokenizer", CharTokenizer)
    return LLM(), engine


def text_of(tokens: Sequence[int]) -> str:
    """What the reader of ``tokens`` sees."""
    return CharDecoder().push(tokens)
