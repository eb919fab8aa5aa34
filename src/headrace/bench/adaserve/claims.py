"""What the simulated rows come to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from headrace.bench.adaserve.setups import ABLATIONS, REPLICAS, RIVALS, SETUPS, VARIANTS
from headrace.bench.results import Rows
from headrace.bench.simulation.published import FIGURE_8, GOODPUT_AT_MOST

Case = tuple[str, float, float | None, str]
"""Model, requests a second, SLO scale (None: the trace's own), policy."""

LEAST_MISSED = 0.05
"""Per cent of missed requests that count at least, so that a ratio of violations stays finite."""


def simulated_claims(rows: Rows) -> dict[str, float]:
    """Attainment of every policy at every rate, and what the comparison comes to."""
    mine = [row for row in rows if row["kind"] == "simulated"]
    shares = attainment(mine)
    found = {
        f"sim_attainment_{model}_{rate:g}_{policy}": round(100 * share, 2)
        for (model, rate, tightness, policy), share in shares.items()
        if tightness is None and policy not in VARIANTS
    }
    margins = list(_margins(shares).values())
    if margins:
        found["sim_never_below_margin_points"] = round(min(margins), 2)
    found |= _overload_gain(shares) | _ablations(shares)
    if all(row["published"] for row in mine):
        found |= _baseline_errors(shares)
        for model in SETUPS:
            found |= _against_published(model, shares, mine)
    return found


def attainment(rows: Rows) -> dict[Case, float]:
    """Mean share over seeds, by case."""
    return _means(rows, "attainment")


def _means(rows: Rows, field: str) -> dict[Case, float]:
    found: dict[Case, list[float]] = {}
    for row in rows:
        found.setdefault((row["model"], row["rate"], row["tightness"], row["policy"]), []).append(row[field])
    return {case: sum(values) / len(values) for case, values in found.items()}


def _margins(shares: Mapping[Case, float]) -> dict[tuple[str, float, float | None], float]:
    """adaserve minus the best rival, in points, wherever both ran."""
    found = {}
    for (model, rate, tightness, policy), share in shares.items():
        rivals = [shares[case] for name in RIVALS if (case := (model, rate, tightness, name)) in shares]
        if policy == "adaserve" and rivals:
            found[model, rate, tightness] = 100 * (share - max(rivals))
    return found


def _baseline_errors(shares: Mapping[Case, float]) -> dict[str, float]:
    """How far the published systems, as replayed, are from the paper's plots, in points."""
    errors = [
        abs(100 * shares[model, rate, None, policy] - value)
        for model, at in FIGURE_8.items()
        for rate, values in at.items()
        for policy, value in values.items()
        if policy in REPLICAS and (model, rate, None, policy) in shares
    ]
    if not errors:
        return {}
    return {
        "sim_baseline_max_abs_error_points": round(max(errors), 2),
        "sim_baseline_mean_abs_error_points": round(sum(errors) / len(errors), 2),
    }


def _overload_gain(shares: Mapping[Case, float]) -> dict[str, float]:
    """adaserve over the published algorithm, beyond the highest published rate."""
    gains = [
        100 * (share - shares[model, rate, None, "paper"])
        for (model, rate, tightness, policy), share in shares.items()
        if policy == "adaserve" and tightness is None and (model, rate, None, "paper") in shares
        if rate > max(_plain_rates(shares, model))
    ]
    return {"overload_gain_vs_paper_points": round(min(gains), 2)} if gains else {}


def _plain_rates(shares: Mapping[Case, float], model: str) -> list[float]:
    """Rates at which the published systems are replayed: those below overload."""
    rates = [rate for name, rate, _, policy in shares if name == model and policy.startswith("vllm-")]
    return rates or [SETUPS[model].rates[-1]]


def _ablations(shares: Mapping[Case, float]) -> dict[str, float]:
    """What each ablation loses (or wins) against adaserve at the highest published rate and in overload, points."""
    found = {}
    for (model, rate, tightness, policy), share in shares.items():
        whole = shares.get((model, rate, None, "adaserve"))
        if policy in ABLATIONS and tightness is None and whole is not None and rate >= max(_plain_rates(shares, model)):
            found[f"sim_ablation_points_{model}_{rate:g}_{policy}"] = round(100 * (share - whole), 2)
    return found


def _against_published(model: str, shares: Mapping[Case, float], rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Violations and goodput at the highest rate against the best baseline the paper printed."""
    rate = SETUPS[model].rates[-1]
    share = shares.get((model, rate, None, "adaserve"))
    if share is None:
        return {}
    best = max(FIGURE_8[model][rate][name] for name in REPLICAS)
    goodput = _means(rows, "goodput_tok_s")[model, rate, None, "adaserve"]
    return {
        f"sim_violations_ratio_{model}": round((100 - best) / max(100 - 100 * share, LEAST_MISSED), 2),
        f"sim_goodput_ratio_{model}": round(goodput / GOODPUT_AT_MOST[model], 2),
    }
