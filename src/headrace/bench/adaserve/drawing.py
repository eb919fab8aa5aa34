"""Plots of both parts."""

from __future__ import annotations

from pathlib import Path

from headrace.bench.adaserve.claims import attainment
from headrace.bench.adaserve.realclaims import by_case, goodput
from headrace.bench.adaserve.setups import VARIANTS
from headrace.bench.plots import write_curves
from headrace.bench.results import Rows
from headrace.bench.simulation.published import FIGURE_8

Series = dict[str, list[tuple[float, float]]]


def draw(rows: Rows, beside: Path) -> list[Path]:
    """Write a plot of each part that has rows beside the result file; their paths.

    Raises:
        InvalidRequest: no matplotlib, or the folder cannot be written.
    """
    plots = {
        "simulated": (simulated_panels(rows), "requests/s", "simulated"),
        "scales": (scale_panels(rows), "target of the urgent class, times the baseline", "simulated, SLO scales"),
        "real": (real_panels(rows), "load, share of saturation without drafts", "on this machine"),
        "curve": (curve_panels(rows), "rows in a step", "what steps cost here"),
    }
    written = []
    for name, (panels, label, title) in plots.items():
        if any(panels.values()):
            path = beside.with_name(f"{beside.stem}_{name}.png")
            write_curves(path, panels, x_label=label, title=title)
            written.append(path)
    return written


def simulated_panels(rows: Rows) -> dict[str, Series]:
    """Attainment over the rate, a curve for each policy and a panel for each model, the paper's points of AdaServe beside."""
    drawn: dict[str, Series] = {}
    cases = sorted(attainment([r for r in rows if r["kind"] == "simulated"]).items(), key=lambda c: (c[0][3], c[0][1]))
    for (model, rate, tightness, policy), share in cases:
        if tightness is None and policy not in VARIANTS:
            drawn.setdefault(f"{model}: attainment, %", {}).setdefault(policy, []).append((rate, 100 * share))
    for model, at in FIGURE_8.items():
        panel = drawn.get(f"{model}: attainment, %")
        if panel is not None and any(row.get("published") for row in rows):
            panel["AdaServe, published"] = [(rate, values["adaserve"]) for rate, values in at.items()]
    return drawn


def scale_panels(rows: Rows) -> dict[str, Series]:
    """Attainment over the SLO scale."""
    drawn: dict[str, Series] = {}
    cases = sorted(
        (case, share)
        for case, share in attainment([r for r in rows if r["kind"] == "simulated"]).items()
        if case[2] is not None
    )
    for (model, rate, tightness, policy), share in cases:
        name = f"{model} at {rate:g} requests/s: attainment, %"
        drawn.setdefault(name, {}).setdefault(policy, []).append((float(tightness or 0.0), 100 * share))
    return drawn


def real_panels(rows: Rows) -> dict[str, Series]:
    """Attainment and goodput over the load."""
    drawn: dict[str, Series] = {"attainment, %": {}, "goodput, tok/s": {}}
    for (policy, load), runs in sorted(by_case([r for r in rows if r["kind"] == "real"]).items()):
        share = 100 * sum(r["attained"] for r in runs) / sum(r["requests"] for r in runs)
        drawn["attainment, %"].setdefault(policy, []).append((load, share))
        drawn["goodput, tok/s"].setdefault(policy, []).append((load, goodput(runs)))
    return drawn if drawn["attainment, %"] else {}


def curve_panels(rows: Rows) -> dict[str, Series]:
    """Milliseconds of a step and of a layer of drafts over its rows."""
    mine = sorted((r["rows"], r["step_ms"], r["draft_layer_ms"]) for r in rows if r["kind"] == "curve")
    if not mine:
        return {}
    return {
        "milliseconds": {
            "target's step": [(n, step) for n, step, _ in mine],
            "draft's layer": [(n, layer) for n, _, layer in mine],
        }
    }
