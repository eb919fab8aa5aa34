"""``headrace bench pqcache``: runs its halves, and draws the speed half."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from headrace.bench.pqcache.claims import claims
from headrace.bench.results import Result, new_result

Part = Literal["all", "speed", "quality"]
PARTS: tuple[Part, ...] = ("all", "speed", "quality")


def run(
    part: Part, *, quick: bool, progress: Callable[[str], None], kept: list[dict[str, Any]] | None = None
) -> Result:
    """Measure ``part``.

    Args:
        quick: within 90 seconds.
        progress: is told what is measured.
        kept: rows of the other part, from an earlier run.
    """
    load = os.getloadavg()
    rows = list(kept or ())
    if part in ("all", "speed"):
        from headrace.bench.pqcache.speed import speed_rows

        rows += speed_rows(quick, progress)
    if part in ("all", "quality"):
        from headrace.bench.pqcache.quality import quality_rows

        rows += quality_rows(quick, progress)
    return new_result("pqcache", rows, claims, load)


def panels(rows: list[dict[str, Any]]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Milliseconds over tokens of context, for attention and for whole layers."""
    made: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for kind, title in (("attention", "attention of a layer, ms"), ("step", "decoder layer, ms")):
        mine = [row for row in rows if row["kind"] == kind]
        series: dict[str, list[tuple[float, float]]] = {}
        for system in dict.fromkeys(row["system"] for row in mine):
            for length in sorted({row["context"] for row in mine}):
                found = [row["ms"] for row in mine if (row["system"], row["context"]) == (system, length)]
                series.setdefault(system, []).append((length, statistics.median(found)))
        if series:
            made[title] = series
    return made


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Write :func:`panels` as a PNG; nothing where there are no rows for them."""
    from headrace.bench.plots import write_curves

    found = panels(rows)
    if found:
        write_curves(path, found, x_label="tokens of context", title="decode with and without the sketch", log_x=True)
