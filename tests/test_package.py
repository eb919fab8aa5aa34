from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.metadata import requires, version
from pathlib import Path

import pytest

import headrace

ROOT = Path(__file__).parents[1]


def imported(statement: str) -> set[str]:
    """Top-level modules in memory after ``statement`` in a fresh interpreter."""
    program = f"import sys\n{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    return set(done.stdout.split())


def test_every_public_name_can_be_imported() -> None:
    for name in headrace.__all__:
        assert getattr(headrace, name) is not None
    with pytest.raises(AttributeError, match="Nonsense"):
        _ = headrace.Nonsense


def test_importing_headrace_costs_nothing() -> None:
    assert not imported("import headrace; headrace.SamplingParams") & {
        "torch",
        "numpy",
        "transformers",
        "numba",
        "typer",
    }


@pytest.mark.parametrize("module", ["headrace.engine.engine", "headrace.models.runner", "headrace.models.load"])
def test_lower_floors_need_no_web_stack(module: str) -> None:
    loaded = imported(f"import {module}")
    assert "headrace" in loaded
    assert not loaded & {"fastapi", "starlette", "uvicorn", "pydantic", "xgrammar", "typer", "prometheus_client"}


def test_the_server_process_needs_no_torch() -> None:
    assert "torch" not in imported("import headrace.compose, headrace.cli.launch")


def test_the_version_is_stated_once() -> None:
    assert version("headrace") == headrace.__version__


def test_the_pins_satisfy_what_the_package_asks_for() -> None:
    packaging = pytest.importorskip("packaging.requirements")
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines if "==" in line)
    checked = 0
    for text in requires("headrace") or []:
        wanted = packaging.Requirement(text)
        pinned = pins.get(wanted.name.lower().replace("_", "-"))
        if wanted.marker is None or pinned is not None:
            assert pinned is not None, f"{wanted.name} has no pin in constraints.txt"
            assert wanted.specifier.contains(pinned), f"{wanted.name}: pinned {pinned}, wanted {wanted.specifier}"
            checked += 1
    assert checked >= 15


def test_types_are_shipped() -> None:
    assert (ROOT / "src/headrace/py.typed").is_file()


def test_every_module_lives_on_a_floor() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    floors = {part.strip() for layer in contracts[0]["layers"] for part in layer.split("|")}
    package = ROOT / "src/headrace"
    modules = {f"headrace.{path.stem}" for path in package.iterdir() if path.suffix == ".py" or path.is_dir()}
    outside = {"headrace.__init__", "headrace.__main__", "headrace.version", "headrace.__pycache__"}
    assert modules - outside == floors
