"""Token ids to text, a few tokens at a time.

What a decoder has returned never changes: half a UTF-8 character, or text that the next token may rewrite, is held back.
Two kinds of vocabulary exist. In most (byte-level BPE, and sentencepiece's with byte fallback) every token stands for
fixed bytes, so text is their concatenation, decoded incrementally. In the rest (WordPiece, suffix-marked BPE, Metaspace)
a token's text depends on its neighbours; those are decoded in a sliding window.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable
from typing import Any, Protocol

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_WINDOW = 8


class IncrementalDecoder(Protocol):
    """Text of a growing list of tokens."""

    @property
    def pending(self) -> bool:
        """Whether tokens were pushed whose text has not been returned yet."""

    def push(self, ids: Iterable[int]) -> str:
        """The text that is certain once ``ids`` follow what was pushed before."""

    def flush(self) -> str:
        """The rest; bytes that never became a character turn into U+FFFD."""


class Pieces(dict[int, bytes]):
    """Bytes of each token, looked up once per id; ids outside the vocabulary have none.

    Args:
        backend: the ``tokenizers.Tokenizer``.
        convert: from a token's spelling in the vocabulary to its bytes.
    """

    def __init__(
        self, backend: Any, convert: Callable[[str], bytes], *, errors: str = "replace", strip: str = ""
    ) -> None:
        super().__init__()
        self._backend, self._convert = backend, convert
        self.errors = errors
        self.strip = strip

    def __missing__(self, token: int) -> bytes:
        spelling = self._backend.id_to_token(token)
        piece = b"" if spelling is None else self._convert(spelling)
        self[token] = piece
        return piece


class BytesDecoder:
    """Decoder of vocabularies whose tokens stand for fixed bytes; O(1) per token. ``strip`` is cut from the text's start."""

    def __init__(self, pieces: Pieces, hidden: frozenset[int], *, strip: str = "") -> None:
        self._pieces, self._hidden = pieces, hidden
        self._utf8 = codecs.getincrementaldecoder("utf-8")(pieces.errors)
        self._strip = strip

    @property
    def pending(self) -> bool:
        return bool(self._utf8.getstate()[0])

    def push(self, ids: Iterable[int]) -> str:
        pieces, hidden = self._pieces, self._hidden
        return self._strip_start(self._utf8.decode(b"".join([pieces[i] for i in ids if i not in hidden])))

    def flush(self) -> str:
        text = self._strip_start(self._utf8.decode(b"", final=True))
        self._utf8.reset()
        return text

    def _strip_start(self, text: str) -> str:
        if not self._strip or not text:
            return text
        text = text.removeprefix(self._strip)
        self._strip = ""
        return text


class WindowDecoder:
    """Decoder of vocabularies whose tokens depend on their neighbours.

    It decodes the tokens returned last together with the new ones and returns what the new ones add. A text that ends
    in U+FFFD may still be half a character and waits, for at most a few tokens.
    """

    def __init__(self, decode: Callable[[list[int]], str], hidden: frozenset[int]) -> None:
        self._decode, self._hidden = decode, hidden
        self._context: list[int] = []
        self._shown = ""
        self._new: list[int] = []

    @property
    def pending(self) -> bool:
        return bool(self._new)

    def push(self, ids: Iterable[int]) -> str:
        parts = []
        for token in ids:
            if token in self._hidden:
                continue
            self._new.append(token)
            text = self._decode(self._context + self._new)
            if len(self._new) >= _WINDOW or not text.endswith(REPLACEMENT):
                parts.append(self._advance(text))
        return "".join(parts)

    def flush(self) -> str:
        return self._advance(self._decode(self._context + self._new)) if self._new else ""

    def _advance(self, text: str) -> str:
        added = text[len(self._shown) :]
        if added:
            self._context, self._new = self._new, []
            self._shown = self._decode(self._context)
        else:  # a token without text of its own cannot stand for the context
            self._context, self._new = self._context + self._new, []
        return added


def byte_pieces(backend: Any) -> Pieces | None:
    """The table of bytes of ``backend``'s tokens, or None when they have no fixed bytes.

    Bytes of a sentencepiece vocabulary that never become a character count one U+FFFD each, elsewhere one for each maximal
    malformed part, as the ``tokenizers`` library has it. (That library drops the valid characters before them in the same
    run of byte tokens too; here they stay, since they may have been sent already.)
    """
    spec = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {}
    steps = spec["decoders"] if spec.get("type") == "Sequence" else [spec]
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return Pieces(backend, _byte_level)
    if "ByteFallback" not in kinds or not set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip"}:
        return None
    replace = [(step["pattern"].get("String"), step["content"]) for step in steps if step["type"] == "Replace"]
    strips = [step for step in steps if step["type"] == "Strip"]
    if any(pattern is None for pattern, _ in replace) or kinds[-1 - len(strips)] not in ("Fuse", "ByteFallback"):
        return None
    if strips and (kinds[-2:] != ["Fuse", "Strip"] or (strips[0]["start"], strips[0]["stop"]) != (1, 0)):
        return None
    strip = strips[0]["content"] if strips else ""
    return Pieces(backend, _byte_fallback(replace), errors=_EACH_BYTE, strip=strip)


def _byte_level(spelling: str) -> bytes:
    """Bytes of a token spelt in the byte-level alphabet; any other spelling (added tokens) is taken literally."""
    try:
        return bytes([_ALPHABET[char] for char in spelling])
    except KeyError:
        return spelling.encode()


def _byte_fallback(replace: list[tuple[str, str]]) -> Callable[[str], bytes]:
    def convert(spelling: str) -> bytes:
        for pattern, content in replace:
            spelling = spelling.replace(pattern, content)
        if len(spelling) == 6 and spelling.startswith("<0x") and spelling.endswith(">"):
            try:
                return bytes([int(spelling[3:5], 16)])
            except ValueError:
                return spelling.encode()
        return spelling.encode()

    return convert


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's bijection between bytes and printable characters: printable Latin-1 stands for itself, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(rest)}


def _each_byte(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return REPLACEMENT * (error.end - error.start), error.end


_ALPHABET = _byte_alphabet()
_EACH_BYTE = "headrace.each-byte"
codecs.register_error(_EACH_BYTE, _each_byte)
