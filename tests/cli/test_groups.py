"""Dataclasses as groups of options."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Annotated

import typer
from typer.testing import CliRunner

from headrace.cli.groups import flat


@dataclass(frozen=True, slots=True)
class Place:
    host: Annotated[str, typer.Option(help="Where.")] = "here"
    port: Annotated[int, typer.Option("--port", "-p")] = 1


@dataclass(frozen=True, slots=True)
class Time:
    hours: Annotated[list[str] | None, typer.Option()] = None


seen: list[object] = []


@flat
def go(place: Place, time: Time, what: Annotated[str, typer.Argument()] = "all") -> None:
    """Go there."""
    seen.append((place, time, what))


def test_fields_become_options_and_come_back_as_groups() -> None:
    app = typer.Typer()
    app.command()(go)
    done = CliRunner().invoke(app, ["some", "-p", "7", "--hours", "a", "--hours", "b"])
    assert done.exit_code == 0, done.output
    assert seen.pop() == (Place("here", 7), Time(["a", "b"]), "some")
    assert CliRunner().invoke(app, ["--port", "x"]).exit_code == 2
    help_text = CliRunner().invoke(app, ["--help"]).output
    assert "Go there." in help_text
    assert "Where." in help_text


def test_the_signature_is_flat() -> None:
    parameters = inspect.signature(go).parameters
    assert {name: p.default for name, p in parameters.items()} == {
        "host": "here",
        "port": 1,
        "hours": None,
        "what": "all",
    }
    assert go.__name__ == "go"
