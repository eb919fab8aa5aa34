"""What is measured already: rows of finished replays in a file of the user's cache, so that an interrupted run goes on.

The file's name holds a fingerprint of everything a replay depends on: the trace, and the source of engine, policies and simulation.
A replay of other code or another trace is never taken for this one.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from headrace.bench.adaserve.cells import Cell
from headrace.core.cache import cache_folder

SOURCES = ("core", "engine", "speculation", "bench/adaserve", "bench/simulation", "bench/workloads", "bench/metrics.py")
"""What a replay runs through, below the package."""


def fingerprint(trace: Path) -> str:
    """A digest of the trace and of the code."""
    package = Path(__file__).parents[2]
    digest = hashlib.sha256(trace.read_bytes())
    for part in SOURCES:
        place = package / part
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


class Journal:
    """Rows by cell, kept in a file as they come.

    Args:
        file: a JSON line for each cell; lines that were cut off are ignored.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._known: dict[str, list[dict[str, Any]]] = {}
        if file.is_file():
            for line in file.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                    self._known[entry["cell"]] = entry["rows"]
                except (ValueError, KeyError, TypeError):
                    continue

    @classmethod
    def of(cls, trace: Path, *, again: bool = False) -> Journal:
        """The journal of replays of ``trace`` by this code; ``again`` forgets what it holds."""
        file = cache_folder("bench") / f"adaserve-{fingerprint(trace)}.jsonl"
        if again:
            file.unlink(missing_ok=True)
        return cls(file)

    def __contains__(self, cell: Cell) -> bool:
        return _key(cell) in self._known

    def get(self, cell: Cell) -> list[dict[str, Any]]:
        """The rows of ``cell``; none when it is not known."""
        return self._known.get(_key(cell), [])

    def add(self, cell: Cell, rows: list[dict[str, Any]]) -> None:
        """Keep the rows of a finished cell."""
        self._known[_key(cell)] = rows
        with self._file.open("a", encoding="utf-8") as out:
            out.write(json.dumps({"cell": _key(cell), "rows": rows}) + "\n")


def _key(cell: Cell) -> str:
    return json.dumps(asdict(cell), sort_keys=True)
