"""Plot of the quality half: what is kept, how far predictions go astray, and answers, against the share of the context attended to."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from headrace.bench.plots import write_curves

SHOWN = ("pq 4x8", "pq 2x6", "oracle", "quest", "sparq 16", "infllm", "snapkv", "pyramidkv", "h2o", "streaming")

Row = Mapping[str, Any]


def write_quality_plot(path: Path, rows: Sequence[Row]) -> None:
    """A PNG of three panels: attention mass kept of recorded attention, divergence under teacher forcing, items answered right.

    Raises:
        InvalidRequest: no matplotlib, or the file cannot be written.
    """
    panels = {
        "attention mass kept": _curves(rows, "recorded", lambda row: row["mass"]),
        "divergence from dense, nats a token": _curves(rows, "forced", lambda row: row["divergence"]),
        "items answered right": _curves(rows, "task", lambda row: row["right"] / row["items"]),
    }
    title = "PQCache and others at the same number of attended tokens"
    write_curves(path, panels, x_label="share of the context attended to", title=title)


def _curves(rows: Sequence[Row], kind: str, value: Callable[[Row], float]) -> dict[str, list[tuple[float, float]]]:
    """Per method the mean of ``value`` at each budget."""
    found: dict[str, list[tuple[float, float]]] = {}
    mine = [row for row in rows if row.get("part") == "quality" and row["kind"] == kind]
    for method in SHOWN:
        budgets = sorted({row["budget"] for row in mine if row["method"] == method})
        if budgets:
            found[method] = [
                (
                    budget,
                    statistics.fmean(value(row) for row in mine if (row["method"], row["budget"]) == (method, budget)),
                )
                for budget in budgets
            ]
    return found
