"""The file every benchmark writes: what ran, where, the raw rows, and claims computed from them."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from headrace.core.errors import InvalidRequest

Rows = Sequence[Mapping[str, Any]]
ClaimsOf = Callable[[Rows], dict[str, float]]

PACKAGES = ("headrace", "torch", "transformers", "numpy", "numba", "tokenizers")


@dataclass(slots=True)
class Result:
    """One benchmark run. ``rows`` are raw measurements; ``claims`` are flat and computed from the rows alone.

    ``partial`` is set when the run was interrupted and holds only what was measured until then.
    """

    name: str
    command: str
    versions: dict[str, str]
    device: dict[str, Any]
    load_avg: tuple[float, ...]
    rows: list[dict[str, Any]]
    claims: dict[str, float] = field(default_factory=dict)
    partial: bool = False

    def write(self, path: Path) -> None:
        """Write as JSON, a row a line; raises :class:`InvalidRequest` when the folder cannot be written."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self._text())
        except OSError as error:
            raise InvalidRequest(
                f"cannot write {path}: {error.strerror}; choose another --json", field="json"
            ) from error

    def _text(self) -> str:
        fields = asdict(self)
        rows = ",\n  ".join(json.dumps(row) for row in fields["rows"])
        whole = json.dumps({**fields, "rows": []}, indent=1)
        return whole.replace('"rows": []', f'"rows": [\n  {rows}\n ]', 1) + "\n"


def new_result(name: str, rows: list[dict[str, Any]], claims: ClaimsOf, load_avg: tuple[float, ...]) -> Result:
    """A result of this machine and this command line. ``load_avg`` is the load before the run."""
    command = "headrace " + " ".join(sys.argv[1:])
    return Result(name, command, _versions(), _device(), load_avg, rows, claims(rows))


def recheck(path: Path, claims: Mapping[str, ClaimsOf]) -> dict[str, tuple[float, float]]:
    """Claims of a result file that do not follow from its rows: name to (stated, recomputed)."""
    try:
        data = json.loads(path.read_text())
        stated, again = data["claims"], claims[data["name"]](data["rows"])
        stated = dict(stated)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidRequest(f"{path} is not a result file of headrace bench: {error}", field="file") from error
    return {
        name: (stated.get(name, float("nan")), again.get(name, float("nan")))
        for name in {*stated, *again}
        if stated.get(name) != again.get(name)
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _device() -> dict[str, Any]:
    return {"cpu": _cpu_name(), "cores": os.cpu_count(), "system": platform.platform(terse=True)}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
