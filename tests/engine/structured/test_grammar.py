"""Grammars: compilation beside the loop, errors that help, and states that can be rolled back and forked."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest
from tests import tiny
from tests.models import vocabularies

from headrace.core.errors import HeadraceError, InvalidRequest
from headrace.core.request import Structure
from headrace.engine.structured import grammar
from headrace.engine.structured.grammar import CompiledGrammar, GrammarCompiler, GrammarState, validate
from headrace.models.text.tokenizer import Tokenizer


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer(tiny.tokenizer(mkdtemp(prefix="headrace-")))


@cache
def compiler() -> GrammarCompiler:
    return GrammarCompiler(tokenizer(), tiny.VOCAB, (tiny.EOS, tiny.IM_END))


def start(kind: str, spec: str = "") -> GrammarState:
    return compiler().start(compiler().compile(Structure(kind, spec)).result(60))  # type: ignore[arg-type]


def allowed(state: GrammarState) -> set[str]:
    words = np.full(-(-tiny.VOCAB // 32), -1, np.int32)
    state.fill(words)
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")[: tiny.VOCAB]
    return {tokenizer().token_text(int(token)) for token in np.flatnonzero(bits)}


def push(state: GrammarState, text: str) -> bool:
    return all(state.accept(tokenizer().vocabulary[char]) for char in text)


ENDS = {"<|endoftext|>", "<|im_end|>"}


def test_a_regex_ends_where_nothing_can_follow() -> None:
    state = start("regex", "ab?")
    assert allowed(state) <= {"a", "ab"}
    assert not state.accept(tokenizer().vocabulary["b"])
    assert push(state, "a")
    assert not state.terminated, "b may follow"
    assert allowed(state) == {"b", *ENDS}
    assert push(state, "b")
    assert state.terminated
    assert allowed(state) == ENDS


def test_a_stop_token_terminates_and_can_be_taken_back() -> None:
    state = start("regex", "ab?")
    push(state, "a")
    assert state.accept(tiny.EOS)
    assert state.terminated
    assert allowed(state) == ENDS
    assert not push(state, "b")
    state.rollback(1)
    assert not state.terminated
    assert allowed(state) == {"b", *ENDS}


def test_rollback_and_fork_are_independent() -> None:
    state = start("choice", json.dumps(["abab", "abba"]))
    assert push(state, "ab")
    twin = state.fork()
    assert push(state, "ab")
    assert push(twin, "ba")
    assert state.terminated
    assert twin.terminated
    state.rollback(2)
    assert push(state, "ba")
    twin.rollback(4)
    assert push(twin, "abab")


@pytest.mark.parametrize(
    ("kind", "spec", "good", "bad"),
    [
        ("regex", "[0-9]{2}", "42", "4a"),
        ("choice", '["yes", "no\\n\\"é"]', 'no\n"', "maybe"),
        ("ebnf", 'root ::= "a" root | "b"', "aab", "ac"),
        ("json_object", "", '{"a": 1}', "["),
        ("json_schema", '{"type": "integer"}', "12", '"'),
    ],
)
def test_each_kind(kind: str, spec: str, good: str, bad: str) -> None:
    encoded = [token for char in good for token in tokenizer().encode(char)]
    state = start(kind, spec)
    assert all(state.accept(token) for token in encoded)
    state = start(kind, spec)
    assert not all(state.accept(token) for char in bad for token in tokenizer().encode(char))


def test_special_tokens_are_never_text() -> None:
    state = start("regex", r"[<|a-z_>]+")
    assert "<|im_start|>" not in allowed(state)
    assert "<" in allowed(state)


def test_white_space_is_bounded_and_control_characters_are_out() -> None:
    state = start(
        "json_schema", '{"type": "object", "properties": {"a": {"type": "string", "minLength": 1}}, "required": ["a"]}'
    )
    push(state, "{")
    space = tokenizer().encode(" ")[0]
    count = 0
    while state.accept(space):
        count += 1
    assert count == grammar.MAX_WHITESPACE
    assert all(state.accept(token) for char in '"a":"' for token in tokenizer().encode(char))
    assert not any(char in text for text in allowed(state) for char in "\t\r\x01")


def test_sentencepiece_text_is_what_is_matched() -> None:
    pieces = Tokenizer(vocabularies.folder("byte_fallback", Path(mkdtemp(prefix="headrace-"))))
    made = GrammarCompiler(pieces, pieces.vocab_size, (pieces.vocabulary["</s>"],))
    state = made.start(made.compile(Structure("regex", "mill wheel")).result(60))
    assert not state.accept(pieces.vocabulary["▁mill"])
    assert state.accept(pieces.vocabulary["mill"])
    assert state.accept(pieces.vocabulary["▁wheel"])
    assert state.terminated


def test_without_stop_tokens_a_complete_text_still_terminates() -> None:
    made = GrammarCompiler(tokenizer(), tiny.VOCAB, ())
    state = made.start(made.compile(Structure("regex", "ab")).result(60))
    assert push(state, "ab")
    assert state.terminated


@pytest.mark.parametrize(
    ("kind", "spec", "message"),
    [
        ("regex", "", "is empty"),
        ("ebnf", " ", "is empty"),
        ("ebnf", 'x ::= "a"', "named root"),
        ("choice", "[]", "one or more"),
        ("choice", '["a", ""]', "none of them empty"),
        ("choice", "x", "one or more"),
        ("choice", json.dumps(["x"] * 2000), "at most"),
        ("regex", "a" * 70_000, "64 KiB"),
        ("json_schema", "{", "not JSON"),
    ],
)
def test_cheap_mistakes_are_seen_before_queueing(kind: str, spec: str, message: str) -> None:
    structure = Structure(kind, spec)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match=message) as caught:
        validate(structure)
    assert caught.value.field == ("response_format" if kind.startswith("json") else "structured_outputs")
    with pytest.raises(InvalidRequest, match=message):
        compiler().compile(structure).result(60)


@pytest.mark.parametrize(
    ("kind", "spec", "message"),
    [
        ("regex", "(a", "parenthesis"),
        ("regex", "(?=a)b", "[Ll]ookahead"),
        ("regex", r"(a)\1", "[Bb]ackreference"),
        ("ebnf", 'root ::= "a" |', "line 1"),
        ("ebnf", "root ::= y", "y"),
        ("json_schema", '{"type": "integer", "minimum": 5, "maximum": 1}', "minimum greater"),
    ],
)
def test_what_the_compiler_refuses(kind: str, spec: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        compiler().compile(Structure(kind, spec)).result(60)  # type: ignore[arg-type]
    assert ".cc:" not in caught.value.message


def test_equal_structures_share_a_grammar_and_a_cancel_harms_nobody() -> None:
    first = compiler().compile(Structure("regex", "shared"))
    assert not first.cancel()
    assert compiler().compile(Structure("regex", "shared")) is first
    assert isinstance(first.result(60), CompiledGrammar)


def test_failures_are_not_kept() -> None:
    first = compiler().compile(Structure("regex", "(again"))
    assert first.exception(60) is not None
    assert compiler().compile(Structure("regex", "(again")) is not first


def test_the_cache_is_bounded() -> None:
    made = GrammarCompiler(tokenizer(), tiny.VOCAB, (tiny.EOS,), capacity=2)
    futures = [made.compile(Structure("regex", f"a{i}")) for i in range(4)]
    assert [f.result(60) is not None for f in futures] == [True] * 4
    assert len(made._cache) == 2
    assert made.compile(Structure("regex", "a3")) is futures[3]
    assert made.compile(Structure("regex", "a0")) is not futures[0]


class Slow(GrammarCompiler):
    """Compiles nothing until released when the pattern says so."""

    def __init__(self, **settings: float) -> None:
        super().__init__(tokenizer(), tiny.VOCAB, (tiny.EOS,), **settings)  # type: ignore[arg-type]
        self.release = threading.Event()

    def _compiled(self, backend: object, structure: Structure) -> CompiledGrammar:
        if structure.spec.startswith("slow"):
            self.release.wait(30)
        return super()._compiled(backend, structure)


@pytest.fixture
def slow() -> Iterator[Slow]:
    made = Slow(time_limit_s=0.3)
    made.compile(Structure("regex", "warm")).result(60)
    yield made
    made.release.set()


def test_a_slow_grammar_fails_alone(slow: Slow) -> None:
    stuck = slow.compile(Structure("regex", "slow"))
    behind = slow.compile(Structure("regex", "quick"))
    with pytest.raises(InvalidRequest, match="longer than"):
        stuck.result(10)
    assert behind.result(10)
    assert slow.compile(Structure("regex", "later")).result(10)


def test_when_all_threads_are_stuck_new_grammars_are_refused_until_one_returns(slow: Slow) -> None:
    for spec in ("slow1", "slow2"):
        with pytest.raises(InvalidRequest, match="longer than"):
            slow.compile(Structure("regex", spec)).result(10)
    with pytest.raises(InvalidRequest, match="busy"):
        slow.compile(Structure("regex", "quick")).result(10)
    slow.release.set()
    deadline = time.monotonic() + 10
    while True:
        try:
            assert slow.compile(Structure("regex", "quick")).result(10)
            break
        except HeadraceError:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_missing_tokenizer_is_reported(tmp_path: Path) -> None:
    made = GrammarCompiler(tmp_path, tiny.VOCAB, (tiny.EOS,))
    with pytest.raises(HeadraceError, match="tokenizer"):
        made.compile(Structure("regex", "a")).result(60)
