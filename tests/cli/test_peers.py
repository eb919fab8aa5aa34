"""``headrace bench peers``: the list, and what an installation is refused for."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from headrace.bench import peers
from headrace.cli import app
from headrace.core.errors import InvalidRequest


def test_the_list_names_what_is_here_and_how_to_get_the_rest(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["bench", "peers", "--peers", str(tmp_path)], env={"COLUMNS": "300"})
    assert result.exit_code == 0, result.output
    lines = {line.split()[0]: line for line in result.output.splitlines() if line.strip()}
    assert "headrace bench peers install vllm" in lines["vllm"]
    assert "install" not in lines["transformers"]


def test_a_wrong_name_is_refused_before_anything_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "install", lambda name, folder: pytest.fail("installed something"))
    result = CliRunner().invoke(app, ["bench", "peers", "install", "openvino", "sglang", "--peers", str(tmp_path)])
    assert isinstance(result.exception, InvalidRequest)
    assert "'sglang': choose of" in str(result.exception)


def test_names_are_installed_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def install(name: str, folder: Path | None) -> peers.Peer:
        asked.append(name)
        return peers.discover(folder, [name])[0]

    monkeypatch.setattr(peers, "install", install)
    result = CliRunner().invoke(app, ["bench", "peers", "install", "vllm", "openvino", "--peers", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert asked == ["vllm", "openvino"]
    assert "was not found" in result.output
