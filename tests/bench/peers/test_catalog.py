"""Discovery reads what is installed and runs nothing; installation runs pip as the recipe says."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from headrace.bench.peers import PRECISIONS, discover, install, ours, peers_folder
from headrace.bench.peers.catalog import DRIVERS, RECIPES, interpreter
from headrace.core.errors import InvalidRequest


def make_environment(folder: Path, name: str, distribution: str, version: str) -> None:
    """What of a virtual environment discovery looks at."""
    python = interpreter(folder / name)
    python.parent.mkdir(parents=True)
    python.touch()
    info = (
        folder / name / "lib" / "python3.11" / "site-packages" / f"{distribution.replace('-', '_')}-{version}.dist-info"
    )
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")


def test_what_is_installed_is_found_with_its_version_and_the_rest_with_a_remedy(tmp_path: Path) -> None:
    make_environment(tmp_path, "openvino", "openvino-genai", "2026.4.1.0")
    make_environment(tmp_path, "vllm", "something-else", "1.0")
    found = {peer.name: peer for peer in discover(tmp_path)}
    assert found["openvino"].version == "2026.4.1.0"
    assert found["openvino"].python == tmp_path / "openvino" / "bin" / "python"
    assert found["transformers"].installed
    assert str(found["transformers"].python) == sys.executable
    assert not found["vllm"].installed
    assert not found["ctranslate2"].installed
    assert found["vllm"].remedy == f"headrace bench peers install vllm --peers {tmp_path}"
    assert ours(tmp_path).name == next(iter(found)) == "headrace"


def test_the_folder_comes_from_the_argument_else_the_environment_else_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HEADRACE_PEERS", raising=False)
    assert peers_folder() == tmp_path / "cache" / "peers"
    monkeypatch.setenv("HEADRACE_PEERS", str(tmp_path / "stated"))
    assert peers_folder() == tmp_path / "stated"
    assert peers_folder(tmp_path / "given") == tmp_path / "given"


def test_an_unknown_peer_is_refused_with_the_choices(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="'sglang': choose of headrace, transformers"):
        discover(tmp_path, ["sglang"])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_recipe_names_a_driver_that_ships_and_precisions_there_are(recipe: object) -> None:
    assert (DRIVERS / recipe.driver[0]).is_file()  # type: ignore[attr-defined]
    assert set(recipe.precisions) <= set(PRECISIONS)  # type: ignore[attr-defined]


def test_drivers_import_nothing_of_ours_when_they_are_read() -> None:
    for path in DRIVERS.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = (
                [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", "") or ""]
            )
            assert not any(name.startswith("headrace") for name in names), path.name


def test_installing_makes_the_environment_runs_pip_and_removes_what_breaks(tmp_path: Path) -> None:
    ran: list[list[str]] = []

    def run(command: list[str], environment: dict[str, str]) -> int:
        ran.append(command)
        if "venv" in command:
            make_environment(tmp_path, "ctranslate2", "ctranslate2", "4.8.5")
        return 0

    assert install("ctranslate2", tmp_path, run=run).version == "4.8.5"
    python = str(tmp_path / "ctranslate2" / "bin" / "python")
    assert ran[0] == [sys.executable, "-m", "venv", str(tmp_path / "ctranslate2")]
    assert ran[1][:4] == [python, "-m", "pip", "install"]
    assert "ctranslate2" in ran[1]
    assert ran[2][:5] == [python, "-m", "pip", "uninstall", "--yes"]
    assert "torchvision" in ran[2]


def test_the_variables_of_a_build_reach_pip_and_a_failure_is_named(tmp_path: Path) -> None:
    def run(command: list[str], environment: dict[str, str]) -> int:
        assert "-DGGML_NATIVE=ON" in environment["CMAKE_ARGS"]
        return 0 if "venv" in command else 3

    with pytest.raises(
        InvalidRequest, match=r"installing llama\.cpp failed with status 3: .*pip install llama-cpp-python"
    ):
        install("llama.cpp", tmp_path, run=run)


def test_what_lives_in_our_environment_needs_no_installation(tmp_path: Path) -> None:
    assert install("transformers", tmp_path, run=lambda command, environment: pytest.fail("ran something")).installed
