"""Claims of the quality half: pure functions of rows."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
Rows = Sequence[Row]

REPORTED = "pq 4x8, residual"
"""The method that claims speak of where they name no other."""

REFRESH = 0.25
"""The rule of refresh that the drift claim speaks of; no refresh is None."""


def quality_claims(rows: Rows) -> dict[str, float]:
    """Every claim that the rows carry; one whose rows are missing is left out.

    Items are differences of items answered right, summed over families, lengths and models. Masses are means over models, each the
    mean of its layers, at a tenth of the context. Gaps are means over windows, in nats a token. Drift gaps are in points of attention
    mass, the mean of a model's layers, of the worst model and code.
    """
    mine = [row for row in rows if row.get("part") == "quality"]
    found = _masses(mine) | _tasks(mine) | _gaps(mine) | _drift(mine)
    return {name: round(value, 5) for name, value in found.items() if value is not None}


def _masses(rows: Rows) -> dict[str, float | None]:
    recorded = [row for row in rows if row["kind"] == "recorded" and row["budget"] == 0.1]

    def kept(method: str, key: str) -> float | None:
        models = {row["model"] for row in recorded if row["method"] == method}
        return _mean(
            statistics.fmean(row[key] for row in recorded if row["method"] == method and row["model"] == model)
            for model in models
        )

    return {
        "mass_kept_4x8": kept("pq 4x8", "mass"),
        "mass_kept_2x6": kept("pq 2x6", "mass"),
        "mass_kept_oracle": kept("oracle", "mass"),
        "mass_kept_quest_same_tokens": kept("quest", "mass"),
        "mass_kept_snapkv_same_tokens": kept("snapkv", "mass"),
        "output_error_4x8": kept("pq 4x8", "error"),
        "output_error_4x8_residual": kept("pq 4x8, residual", "error"),
    }


def _tasks(rows: Rows) -> dict[str, float | None]:
    tasks = [row for row in rows if row["kind"] == "task"]

    def difference(method: str, budget: float, family: str | None = None) -> float | None:
        """Items right with a method, less items right with dense attention, on the same questions."""
        total, seen = 0, False
        for row in tasks:
            if row["method"] != method or row["budget"] != budget or (family and row["family"] != family):
                continue
            total, seen = total + row["right"] - _dense(tasks, row)["right"], True
        return float(total) if seen else None

    dense = [row for row in tasks if row["method"] == "dense"]
    items = sum(row["items"] for row in dense)
    found = {
        "dense_acc": min(_accuracies(dense).values()) if items else None,
        "acc_r5_minus_dense_items": difference(REPORTED, 0.2),
        "acc_r10_minus_dense_items": difference(REPORTED, 0.1),
        "acc_r20_minus_dense_items": difference(REPORTED, 0.05),
        "acc_r10_plain_minus_dense_items": difference("pq 4x8", 0.1),
        "acc_r10_plain_2x6_minus_dense_items": difference("pq 2x6", 0.1),
        "acc_moved_pq_minus_dense_items": difference(REPORTED, 0.1, "moved"),
        "acc_moved_snapkv_minus_dense_items": difference("snapkv", 0.1, "moved"),
        "task_items": float(items) if items else None,
    }
    return found | {"acc_r10_minus_best_dropping_items": _over_dropping(tasks)}


def _accuracies(rows: Iterable[Row]) -> dict[tuple[str, str], float]:
    """Share of items right by model and family."""
    counts: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        count = counts.setdefault((row["model"], row["family"]), [0, 0])
        count[0] += row["right"]
        count[1] += row["items"]
    return {key: right / items for key, (right, items) in counts.items()}


def _over_dropping(tasks: Rows) -> float | None:
    """The least lead, in items, over the best dropping method, of all task families, at a tenth."""
    at_tenth = [row for row in tasks if row["budget"] == 0.1]
    leads = []
    for family in {row["family"] for row in at_tenth}:
        right: dict[str, int] = {}
        for row in at_tenth:
            if row["family"] == family:
                right[row["method"]] = right.get(row["method"], 0) + row["right"]
        rivals = [count for method, count in right.items() if method in ("streaming", "h2o", "snapkv", "pyramidkv")]
        if rivals and REPORTED in right:
            leads.append(right[REPORTED] - max(rivals))
    return float(min(leads)) if leads else None


def _dense(tasks: Rows, row: Row) -> Row:
    key = (row["model"], row["family"], row["length"])
    return next(r for r in tasks if r["method"] == "dense" and (r["model"], r["family"], r["length"]) == key)


def _gaps(rows: Rows) -> dict[str, float | None]:
    forced = [row for row in rows if row["kind"] == "forced"]
    found: dict[str, float | None] = {}
    for name, budget in (("r5", 0.2), ("r10", 0.1), ("r20", 0.05)):
        for suffix, method in (
            ("", REPORTED),
            ("_plain", "pq 4x8"),
            ("_plain_2x6", "pq 2x6"),
            ("_snapkv", "snapkv"),
        ):
            some = [row for row in forced if row["method"] == method and row["budget"] == budget]
            found[f"nll_gap_{name}{suffix}"] = _mean(row["gap"] for row in some)
            found[f"divergence_{name}{suffix}"] = _mean(row["divergence"] for row in some)
    return found


def _drift(rows: Rows) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name, rule in (("refresh", REFRESH), ("norefresh", None)):
        gaps: dict[tuple[str, str], list[float]] = {}
        for row in rows:
            if row["kind"] == "drift" and row["refresh"] == rule:
                gap = 100.0 * (row["mass_fresh"] - row["mass"])
                gaps.setdefault((row["model"], row["codes"]), []).append(gap)
        found[f"long_decode_drift_gap_{name}"] = max((statistics.fmean(of) for of in gaps.values()), default=None)
    return found


def _mean(values: Iterable[float]) -> float | None:
    listed = list(values)
    return statistics.fmean(listed) if listed else None
