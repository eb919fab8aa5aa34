"""Plots of results as PNG. matplotlib is optional, and imported only here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headrace.core.errors import InvalidRequest

Series = Mapping[str, Sequence[tuple[float, float]]]


def need_matplotlib() -> Any:
    """``matplotlib.figure``.

    Raises:
        InvalidRequest: matplotlib is not installed; the message says how to get it or do without.
    """
    try:
        from matplotlib import figure
    except ImportError as error:
        raise InvalidRequest(
            "plots need matplotlib: pip install 'headrace[plots]', or leave --plot out", field="plot"
        ) from error
    return figure


def write_curves(
    path: Path, panels: Mapping[str, Series], *, x_label: str, title: str = "", log_x: bool = False, marks: str = "o-"
) -> None:
    """One panel per entry of ``panels`` with one curve per series of (x, y), written to ``path``.

    Raises:
        InvalidRequest: no matplotlib, or the file cannot be written.
    """
    figure = need_matplotlib().Figure(figsize=(4.6 * len(panels), 3.8), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (name, series) in zip(axes, panels.items(), strict=True):
        for label, points in series.items():
            axis.plot([x for x, _ in points], [y for _, y in points], marks, label=label, markersize=4)
        axis.set(title=name, xlabel=x_label)
        if log_x:
            axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
        axis.set_ylim(bottom=0)
    axes[0].legend(fontsize=8)
    figure.suptitle(title)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"cannot write the plot {path}: {error}; choose another --plot", field="plot") from error
