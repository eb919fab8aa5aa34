"""Tokenizers: text of any chunking equals the whole, templates refuse politely, broken folders say so."""

from __future__ import annotations

import itertools
import json
import threading
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import tiny
from tests.models import vocabularies

from headrace.core.errors import BrokenCheckpoint, InvalidRequest, UnsupportedModel
from headrace.models.text.detokenizer import REPLACEMENT, BytesDecoder, WindowDecoder
from headrace.models.text.tokenizer import Tokenizer, check_same_vocabulary

KINDS = list(vocabularies.KINDS)
TEXT = "The mill's wheel: 水は流れる, naïve café 🙂🧵👩‍👩‍👧 Привет\n\tend"


@cache
def load(kind: str) -> Tokenizer:
    return Tokenizer(vocabularies.folder(kind, Path(mkdtemp(prefix="headrace-"))))


def chunked(ids: list[int], cuts: list[int]) -> list[list[int]]:
    places = sorted({min(cut, len(ids)) for cut in cuts} | {0, len(ids)})
    return [ids[a:b] for a, b in itertools.pairwise(places)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip", [True, False])
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_pushes_of_any_chunking_join_to_the_whole(kind: str, skip: bool, data: st.DataObject) -> None:
    tokenizer = load(kind)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=40))
    decoder = tokenizer.stream(skip)
    parts = [decoder.push(chunk) for chunk in chunked(ids, data.draw(st.lists(st.integers(0, 40), max_size=10)))]
    parts.append(decoder.flush())
    assert "".join(parts) == tokenizer.decode(ids, skip)
    assert not decoder.pending


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("byte_fallback")])
@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_random_ids_decode_as_in_the_tokenizers_library(kind: str, data: st.DataObject) -> None:
    tokenizer = load(kind)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    skip = data.draw(st.booleans())
    assert tokenizer.decode(ids, skip) == tokenizer.hf.backend_tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "byte_fallback_no_strip"])
@settings(deadline=None, max_examples=80)
@given(text=st.text(max_size=30), cut=st.integers(0, 3))
def test_text_survives_and_matches_the_library(kind: str, text: str, cut: int) -> None:
    tokenizer = load(kind)
    ids = tokenizer.encode(text)
    whole = tokenizer.hf.backend_tokenizer.decode(ids)
    assert tokenizer.decode(ids) == whole
    if kind == "byte_level":
        assert whole == text


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_returned_changes_and_no_half_character_appears(kind: str) -> None:
    tokenizer = load(kind)
    ids = tokenizer.encode(TEXT)
    whole, decoder, text = tokenizer.decode(ids), tokenizer.stream(), ""
    for token in ids:
        text += decoder.push([token])
        assert whole.startswith(text)
    assert text + decoder.flush() == whole
    assert REPLACEMENT not in whole


def test_text_streams_as_soon_as_a_character_is_whole() -> None:
    for kind in ("byte_level", "byte_fallback"):
        tokenizer = load(kind)
        decoder = tokenizer.stream()
        ids = tokenizer.encode("🙂")
        assert len(ids) >= 2
        seen = [decoder.push([token]) for token in ids]
        assert "".join(seen[:-1]).strip() == ""
        assert seen[-1] == "🙂"


def test_truncated_character_is_replaced_at_the_end_only() -> None:
    for kind in ("byte_level", "byte_fallback"):
        tokenizer = load(kind)
        ids = tokenizer.encode("a🙂")[:-1]
        decoder = tokenizer.stream()
        assert decoder.push(ids) == "a"
        assert decoder.pending
        assert decoder.flush() == tokenizer.hf.backend_tokenizer.decode(ids)[1:]
        assert not decoder.pending


def test_valid_characters_before_broken_bytes_are_kept() -> None:
    tokenizer = load("byte_fallback")
    names = ["<0xC3>", "<0xA9>", "<0xE2>", "<0x82>", "▁mill"]
    assert tokenizer.decode([tokenizer.vocabulary[name] for name in names]) == "é" + REPLACEMENT * 2 + " mill"


def test_a_continuation_keeps_its_leading_space() -> None:
    tokenizer = load("byte_fallback")
    ids = tokenizer.encode("mill")
    assert tokenizer.decode(ids) == "mill"
    assert tokenizer.stream(continues=True).push(ids) == " mill"


def test_each_layout_takes_the_expected_decoder() -> None:
    for kind in KINDS:
        expected = BytesDecoder if kind.startswith("byte") else WindowDecoder
        assert isinstance(load(kind).stream(), expected), kind


def test_special_tokens_are_hidden_on_request() -> None:
    tokenizer = load("byte_level")
    ids = [*tokenizer.encode("a"), 0, *tokenizer.encode("b")]
    assert tokenizer.decode(ids) == "ab"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a<|endoftext|>b"


def test_bytes_and_text_of_single_tokens() -> None:
    level, fallback, pieces = load("byte_level"), load("byte_fallback"), load("wordpiece")
    ids = level.encode(TEXT)
    assert b"".join(level.token_bytes(token) for token in ids).decode() == TEXT
    assert level.token_text(0) == "<|endoftext|>"
    assert level.token_bytes(10**6) == b""
    assert fallback.token_text(fallback.vocabulary["▁mill"]) == " mill"
    assert fallback.token_bytes(fallback.vocabulary["<0xE2>"]) == b"\xe2"
    assert fallback.token_text(fallback.vocabulary["<0xE2>"]) == REPLACEMENT
    assert pieces.token_text(pieces.vocabulary["##mill"]) == "##mill"


def test_eos_ids_join_generation_config_and_tokenizer(tmp_path: Path) -> None:
    tiny.tokenizer(tmp_path)
    assert Tokenizer(tmp_path).eos_ids == (tiny.EOS,)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 9}))
    assert Tokenizer(tmp_path).eos_ids == (tiny.EOS, 9)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [tiny.IM_END, 7]}))
    assert Tokenizer(tmp_path).eos_ids == tuple(sorted({tiny.EOS, tiny.IM_END, 7}))


def test_chat_matches_transformers_and_takes_text_parts() -> None:
    tokenizer = Tokenizer(tiny.tokenizer(Path(mkdtemp(prefix="headrace-"))))
    messages = [{"role": "user", "content": "Hi there"}]
    expected = tokenizer.hf.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer.chat(messages) == expected
    parts = [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there"}]
    assert tokenizer.chat([{"role": "user", "content": parts}]) == expected
    assert tokenizer.chat(messages, add_generation_prompt=False) != expected


def test_image_parts_are_refused_by_place() -> None:
    tokenizer = Tokenizer(tiny.tokenizer(Path(mkdtemp(prefix="headrace-"))))
    with pytest.raises(InvalidRequest, match="image_url") as caught:
        tokenizer.chat([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])
    assert caught.value.field == "messages[0].content[0]"


def test_no_template_points_to_the_remedy() -> None:
    with pytest.raises(InvalidRequest, match="--chat-template") as caught:
        load("byte_fallback").chat([{"role": "user", "content": "x"}])
    assert caught.value.field == "messages"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0]['content'] + 1 }}",
        "{% if %}",
        "{{ ().__class__.__mro__ }}",
    ],
)
def test_template_errors_are_the_clients(template: str) -> None:
    tokenizer = Tokenizer(load("byte_level").path, chat_template=template)
    with pytest.raises(InvalidRequest, match="chat template refused"):
        tokenizer.chat([{"role": "user", "content": "x"}])


def test_template_from_a_file_and_kwargs(tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text("{{ mood }}:{{ messages[0]['content'] }}")
    tokenizer = Tokenizer(load("byte_level").path, chat_template=str(file))
    assert tokenizer.decode(tokenizer.chat([{"role": "user", "content": "x"}], mood="calm")) == "calm:x"
    with pytest.raises(InvalidRequest, match="chat_template") as caught:
        tokenizer.chat([{"role": "user", "content": "x"}], chat_template="{{ 1 }}")
    assert caught.value.field == "chat_template_kwargs"
    with pytest.raises(InvalidRequest, match="cannot be read"):
        Tokenizer(load("byte_level").path, chat_template=str(tmp_path / "missing.jinja"))


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="surrogate"):
        load("byte_level").encode("a\ud800b")


def test_broken_folders(tmp_path: Path) -> None:
    with pytest.raises(BrokenCheckpoint, match="not a folder"):
        Tokenizer(tmp_path / "missing")
    with pytest.raises(BrokenCheckpoint, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model"')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(BrokenCheckpoint, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)


def test_same_vocabulary() -> None:
    check_same_vocabulary(load("byte_level"), Tokenizer(load("byte_level").path))
    with pytest.raises(UnsupportedModel, match="first at id") as caught:
        check_same_vocabulary(load("byte_level"), load("byte_fallback"))
    assert caught.value.field == "draft"


def test_threads_may_share_a_tokenizer() -> None:
    tokenizer = load("byte_level")
    expected, wrong = tokenizer.encode(TEXT), []

    def work() -> None:
        for _ in range(50):
            ids = tokenizer.encode(TEXT)
            if ids != expected or tokenizer.decode(ids) != TEXT:
                wrong.append(ids)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
