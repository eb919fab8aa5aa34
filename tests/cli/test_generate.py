from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from tests.engine import fake
from tests.llm.doubles import CharTokenizer, text_of

from headrace.cli.generate import generate
from headrace.core.errors import InvalidRequest


@pytest.fixture(autouse=True)
def model(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The fake language model of the engine's tests; the configurations it was asked for."""
    configs: list[Any] = []

    def build(config: Any) -> Any:
        configs.append(config)
        return fake.engine()

    class Tokenizer(CharTokenizer):
        hf = type("Hf", (), {"chat_template": None})()

    monkeypatch.setattr("headrace.compose.build_engine", build)
    monkeypatch.setattr("headrace.models.text.tokenizer.Tokenizer", Tokenizer)
    return configs


def expected(prompt: str, count: int, index: int = 0) -> str:
    ids = CharTokenizer("").encode(prompt)
    return text_of(fake.answer(fake.request("x", ids, max_tokens=count, seed=3), index))


def test_one_prompt_prints_its_answer_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    generate(["abc"], max_tokens=9, seed=3)
    assert capsys.readouterr() == (expected("abc", 9).strip() + "\n", "")


def test_several_prompts_and_answers_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    generate(["abc", "xyz"], max_tokens=5, seed=3, n=2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "── abc"
    assert "── xyz" in lines
    assert lines[1] == f"[1] {expected('abc', 5).strip()}"
    assert lines[2] == f"[2] {expected('abc', 5, 1).strip()}"


def test_json_lines_for_machines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts"
    file.write_text("abc\n\nxyz\n")
    generate(["first"], file=file, json_lines=True, max_tokens=5, seed=3)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in rows] == ["first", "abc", "xyz"]
    assert [row["outputs"][0]["text"] for row in rows] == [expected(row["prompt"], 5) for row in rows]
    assert {row["outputs"][0]["finish_reason"] for row in rows} <= {"length", "stop"}
    assert rows[0]["prompt_tokens"] == 5


def test_prompts_from_the_input(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("abc\n"))
    generate([], file=Path("-"), max_tokens=5, seed=3)
    assert capsys.readouterr().out == expected("abc", 5).strip() + "\n"


def test_the_chat_template_is_used_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from headrace.models.text.tokenizer import Tokenizer

    generate(["hi"], chat=True, system="be kind", max_tokens=5, seed=3)
    assert capsys.readouterr().out == expected("system: be kinduser: hi", 5).strip() + "\n"
    monkeypatch.setattr(Tokenizer.hf, "chat_template", "{{ messages }}", raising=False)
    generate(["hi"], max_tokens=5, seed=3)
    assert capsys.readouterr().out == expected("user: hi", 5).strip() + "\n"
    generate(["hi"], chat=False, max_tokens=5, seed=3)
    assert capsys.readouterr().out == expected("hi", 5).strip() + "\n"


def test_engine_options_reach_the_engine(model: list[Any]) -> None:
    generate(["abc"], model="a/folder", dtype="float16", threads=3, max_tokens=1)
    assert (model[0].model, model[0].dtype, model[0].threads) == ("a/folder", "float16", 3)


def test_bad_input_is_refused_before_the_model_is_loaded(model: list[Any], tmp_path: Path) -> None:
    broken = tmp_path / "schema.json"
    broken.write_text("{")
    for arguments, words in (
        ({"prompts": []}, "no prompt"),
        ({"prompts": ["a"], "max_tokens": 0}, "max_tokens"),
        ({"prompts": ["a"], "json_schema": broken}, "no JSON"),
        ({"prompts": ["a"], "json_schema": tmp_path / "nowhere"}, "No such file"),
        ({"prompts": ["a"], "system": "s", "chat": False}, "--no-chat"),
    ):
        with pytest.raises(InvalidRequest, match=words):
            generate(**arguments)
    assert model == []
