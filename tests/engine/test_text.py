"""Text streams: whatever the chunking, what comes out is what decoding everything and cutting at the first stop gives."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.models import vocabularies

from headrace.core.outputs import SequenceDelta, TokenLogprobs
from headrace.core.request import SamplingParams
from headrace.engine.text import TextDelta, TextStream
from headrace.models.text.tokenizer import Tokenizer

KINDS = ["byte_level", "byte_fallback", "wordpiece"]
ALPHABET = "ab.é水🙂 "


@cache
def load(kind: str) -> Tokenizer:
    return Tokenizer(vocabularies.folder(kind, Path(mkdtemp(prefix="headrace-"))))


def delta(
    tokens: list[int], reason: str | None = None, stop: int | None = None, *, logprobs: bool = False
) -> SequenceDelta:
    values = [TokenLogprobs(token, -0.5, 1, ((token, -0.5),)) for token in tokens] if logprobs else None
    return SequenceDelta("r", 0, tokens, values, reason, stop)  # type: ignore[arg-type]


def run(stream: TextStream, deltas: list[SequenceDelta]) -> list[TextDelta]:
    return [stream.push(part) for part in deltas]


def earliest(text: str, stops: list[str]) -> tuple[int, str] | None:
    """Where (end) the first stop string is completed, the longest one of several."""
    ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    return (min(ends)[0], min(ends)[2]) if ends else None


def oracle(tokenizer: Tokenizer, ids: list[int], params: SamplingParams) -> tuple[str, int, str | None]:
    """Decode ever longer prefixes from scratch; stop at the first that holds a stop string. Text, tokens, stop."""
    before = ""
    for count in range(1, len(ids) + 1):
        decoder = tokenizer.stream(params.skip_special_tokens, continues=True)
        text = decoder.push(ids[:count]) + (decoder.flush() if count == len(ids) else "")
        if count > params.min_tokens:
            for end in range(len(before) + 1, len(text) + 1):
                found = [stop for stop in params.stop if text[:end].endswith(stop)]
                if found:
                    stop = max(found, key=len)
                    return text[: end if params.include_stop else end - len(stop)], count, stop
        before = text
    return before, len(ids), None


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_any_chunking_gives_the_oracles_text(kind: str, data: st.DataObject) -> None:
    tokenizer = load(kind)
    if data.draw(st.booleans()):
        ids = tokenizer.encode(data.draw(st.text(ALPHABET, max_size=24)))
    else:
        ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=24))
    assume(ids)
    params = SamplingParams(
        stop=data.draw(st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=3)),
        include_stop=data.draw(st.booleans()),
        min_tokens=data.draw(st.sampled_from([0, 0, 1, 3])),
        max_tokens=None,
        logprobs=data.draw(st.sampled_from([None, 1])),
        skip_special_tokens=data.draw(st.booleans()),
    )
    cuts = sorted(data.draw(st.sets(st.integers(1, len(ids)), max_size=8)) | {len(ids)})
    deltas = [
        delta(ids[a:b], "length" if b == len(ids) else None, logprobs=params.logprobs is not None)
        for a, b in zip([0, *cuts], cuts, strict=False)
    ]
    stream = TextStream(tokenizer, params)
    parts = run(stream, deltas)
    text, count, stop = oracle(tokenizer, ids, params)
    assert "".join(part.text for part in parts) == text
    assert [token for part in parts for token in part.tokens] == ids[:count]
    assert stream.tokens == count
    assert stream.stopped == (stop is not None)
    last = next(part for part in parts if part.done and part.finish_reason)
    assert (last.finish_reason, last.stop_reason) == (("stop", stop) if stop else ("length", None))
    for part in parts:
        if params.logprobs is None:
            assert part.logprobs is None
        else:
            assert [entry.token for entry in part.logprobs or []] == part.tokens


@settings(deadline=None, max_examples=200)
@given(text=st.text("ab", max_size=30), stops=st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3))
def test_released_text_never_has_to_be_taken_back(text: str, stops: list[str]) -> None:
    tokenizer = load("byte_level")
    ids = [tokenizer.vocabulary[char] for char in text]
    stream, shown = TextStream(tokenizer, SamplingParams(stop=stops, max_tokens=None)), ""
    for count, token in enumerate(ids, 1):
        part = stream.push(delta([token]))
        shown += part.text
        seen = text[:count]
        found = earliest(seen, stops)
        if found is not None:
            assert shown == seen[: found[0] - len(found[1])]
            assert part.done
            assert part.stop_reason == found[1]
            return
        held = max(n for stop in stops for n in range(len(stop)) if seen.endswith(stop[:n]))
        assert shown == seen[: len(seen) - held], "exactly the longest possible beginning of a stop is held back"


def spell(text: str) -> list[int]:
    tokenizer = load("byte_level")
    return [tokenizer.vocabulary[char] for char in text]


def test_stop_cuts_inside_a_token_and_discards_the_rest() -> None:
    tokenizer = load("byte_level")
    ids = tokenizer.encode("the river falls")
    whole = next(token for token in ids if "river" in tokenizer.token_text(token))
    place = ids.index(whole)
    stream = TextStream(tokenizer, SamplingParams(stop=["ver"], logprobs=1))
    part = stream.push(delta(ids, "length", logprobs=True))
    assert part.text == "the ri"
    assert part.tokens == ids[: place + 1]
    assert [entry.token for entry in part.logprobs or []] == part.tokens
    assert (part.finish_reason, part.stop_reason, part.done) == ("stop", "ver", True)
    assert stream.stopped
    late = stream.push(delta(spell("more"), "abort"))
    assert (late.text, late.tokens, late.finish_reason, late.done) == ("", [], None, True)
    assert stream.tokens == place + 1


def test_held_text_comes_at_the_end_with_its_logprobs() -> None:
    stream = TextStream(load("byte_level"), SamplingParams(stop=["abc"], logprobs=0, max_tokens=None))
    first = stream.push(delta(spell("xab"), logprobs=True))
    assert (first.text, first.tokens) == ("x", spell("x"))
    last = stream.push(delta([], "length"))
    assert (last.text, last.tokens, last.finish_reason) == ("ab", spell("ab"), "length")
    assert [entry.token for entry in last.logprobs or []] == spell("ab")


def test_half_a_character_is_held_back_with_its_token() -> None:
    tokenizer = load("byte_level")
    ids = tokenizer.encode("🙂")
    stream = TextStream(tokenizer, SamplingParams(logprobs=0))
    assert stream.push(delta(ids[:-1], logprobs=True)) == TextDelta("", [], [])
    part = stream.push(delta(ids[-1:], logprobs=True))
    assert (part.text, part.tokens, len(part.logprobs or [])) == ("🙂", ids, len(ids))


@pytest.mark.parametrize(("include", "text"), [(False, "x"), (True, "xa")])
def test_text_of_a_stop_token_is_hidden_unless_included(include: bool, text: str) -> None:
    (token,) = spell("a")
    stream = TextStream(load("byte_level"), SamplingParams(stop_token_ids=[token], include_stop=include))
    part = stream.push(delta([*spell("x"), token], "stop", token))
    assert (part.text, part.tokens, part.finish_reason, part.stop_reason) == (text, [*spell("x"), token], "stop", token)


def test_end_of_text_that_is_ignored_is_ordinary() -> None:
    stream = TextStream(load("byte_level"), SamplingParams(ignore_eos=True, skip_special_tokens=False))
    part = stream.push(delta([0, *spell("a")], "length"))
    assert part.text == "<|endoftext|>a"


def test_min_tokens_lets_early_stop_strings_pass() -> None:
    params = SamplingParams(stop=["ab"], min_tokens=2, max_tokens=None)
    stream = TextStream(load("byte_level"), params)
    parts = run(stream, [delta(spell(char)) for char in "abxab"])
    assert "".join(part.text for part in parts) == "abx"
    assert stream.stopped
    across = TextStream(load("byte_level"), params)
    assert "".join(part.text for part in run(across, [delta(spell(char)) for char in "xab"])) == "x"
    assert across.stopped, "a stop string may begin before min_tokens, only its end counts"


def test_abort_and_error_release_what_is_held() -> None:
    stream = TextStream(load("byte_level"), SamplingParams(stop=["ab"]))
    assert stream.push(delta(spell("a"))).text == ""
    part = stream.push(delta([], "abort"))
    assert (part.text, part.finish_reason, part.done) == ("a", "abort", True)


def test_long_stop_strings_stay_linear() -> None:
    stream = TextStream(load("byte_level"), SamplingParams(stop=["a" * 20_000 + "b"], max_tokens=None))
    part = stream.push(delta(spell("a") * 30_000, "length"))
    assert len(part.text) == 30_000
