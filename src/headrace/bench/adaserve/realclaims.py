"""What the rows measured on the real pair come to."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from headrace.bench.adaserve.setups import FIXED, RIVALS
from headrace.bench.results import Rows

USEFUL = 0.6
"""A load is useful while the best policy keeps this share of the requests within their targets."""

Runs = Sequence[Mapping[str, Any]]


def real_claims(rows: Rows) -> dict[str, float]:
    """Attainment by policy and load, margins, and what drafting and deciding took."""
    runs = [row for row in rows if row["kind"] == "real"]
    shares = {case: 100 * _ratio(mine, "attained", "requests") for case, mine in by_case(runs).items()}
    found = {f"real_attainment_{policy}_{load:g}": round(share, 2) for (policy, load), share in shares.items()}
    found |= _against_rivals(runs, shares) | _of_steps(runs) | _identity(rows) | _alone(rows)
    machine = next((row for row in rows if row["kind"] == "machine"), None)
    if machine is not None:
        found["real_baseline_tpot_ms"] = machine["baseline_ms"]
        found["real_saturation_requests_s"] = machine["saturation_requests_s"]
    return found


def by_case(runs: Runs) -> dict[tuple[str, float], list[Mapping[str, Any]]]:
    """Runs by policy and load."""
    found: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for row in runs:
        found.setdefault((row["policy"], row["load"]), []).append(row)
    return found


def _ratio(runs: Runs, above: str, below: str) -> float:
    total = sum(row[below] for row in runs)
    return sum(row[above] for row in runs) / total if total else 0.0


def goodput(runs: Runs) -> float:
    """Tokens a second of requests within their targets, over all of ``runs``."""
    return _ratio([{"good": row["goodput_tok_s"] * row["duration_s"], **row} for row in runs], "good", "duration_s")


def _against_rivals(runs: Runs, shares: Mapping[tuple[str, float], float]) -> dict[str, float]:
    loads = sorted(load for policy, load in shares if policy == "adaserve")
    margins, useful = {}, None
    for load in loads:
        rivals = [shares[name, load] for name in RIVALS if (name, load) in shares]
        if rivals:
            margins[load] = shares["adaserve", load] - max(rivals)
        if max(share for (_, at), share in shares.items() if at == load) >= 100 * USEFUL:
            useful = load
    found = {f"real_margin_points_{load:g}": round(margin, 2) for load, margin in margins.items()}
    if margins:
        found["real_never_below_margin_points"] = round(min(margins.values()), 2)
    fixed = [name for name in FIXED if useful is not None and (name, useful) in shares]
    if fixed and useful is not None:
        cases = by_case(runs)
        best = max(goodput(cases[name, useful]) for name in fixed)
        found["real_highest_useful_load"] = useful
        found["real_goodput_ratio_best_fixed"] = round(goodput(cases["adaserve", useful]) / best, 3) if best else 0.0
        ahead = shares["adaserve", useful] - max(shares[name, useful] for name in fixed)
        found["real_attainment_gain_best_fixed_points"] = round(ahead, 2)
    return found


def _of_steps(runs: Runs) -> dict[str, float]:
    mine = [row for row in runs if row["policy"] == "adaserve"]
    if not mine:
        return {}
    return {
        "real_tokens_per_step": round(1.0 + _ratio(mine, "accepted", "verifications"), 3),
        "selection_time_share": round(_ratio(mine, "plan_s", "step_s"), 5),
        "real_draft_time_share": round(_ratio(mine, "draft_s", "step_s"), 5),
    }


def _identity(rows: Rows) -> dict[str, float]:
    mine = [row for row in rows if row["kind"] == "identity"]
    if not mine:
        return {}
    return {
        "lossless_identical_rate": round(_ratio(mine, "identical", "prompts"), 5),
        "lossless_ties_rate": round(_ratio(mine, "ties", "prompts"), 5),
    }


def _alone(rows: Rows) -> dict[str, float]:
    """Medians over prompts of a lone request."""
    took: dict[str, list[float]] = {}
    for row in rows:
        if row["kind"] == "assisted":
            took.setdefault(row["system"], []).append(row["tpot_ms"])
    mid = {system: statistics.median(times) for system, times in took.items()}
    found = {f"alone_tpot_ms_{system.replace(' ', '_')}": round(ms, 3) for system, ms in mid.items()}
    for system, plain, drafted in (
        ("transformers", "transformers", "transformers assisted"), ("headrace", "headrace chunked", "headrace adaserve"),
    ):  # fmt: skip
        if mid.get(drafted):
            found[f"alone_speedup_by_drafts_{system}"] = round(mid[plain] / mid[drafted], 3)
    return found
