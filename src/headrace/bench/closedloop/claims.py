"""Claims of the closed loop: pure functions of rows, so that anybody can compute them again from a result file."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from headrace.bench.peers.catalog import OURS

Row = Mapping[str, Any]
Rows = Sequence[Row]

REFERENCE, CONTINUOUS = "transformers", "transformers-cb"
COMPARED = ("fp32", "int8")
DISTURBED = 0.7
"""A turn counts as disturbed when memory was slower around it than this share of the run's median."""


class Line(NamedTuple):
    """What one engine reached in one precision and batch size: medians over its turns, and the range of decode rates."""

    engine: str
    precision: str
    batch: int
    decode: float
    low: float
    high: float
    prefill: float
    turns: int


def claims(rows: Rows) -> dict[str, float]:
    """Every claim that the rows carry; one whose rows are missing is left out."""
    found: dict[str, float] = {}
    lines = {(line.engine, line.precision, line.batch): line for line in table(rows)}

    def ratio(name: str, ours: Line | None, theirs: Line | None, measure: Callable[[Line], float]) -> None:
        if ours is not None and theirs is not None:
            found[name] = round(measure(ours) / measure(theirs), 4)

    def best(precision: str, batch: int, measure: Callable[[Line], float]) -> Line | None:
        same = [line for line in lines.values() if (line.precision, line.batch) == (precision, batch)]
        return max((line for line in same if line.engine != OURS), key=measure, default=None)

    def decode(line: Line) -> float:
        return line.decode

    def prefill(line: Line) -> float:
        return line.prefill

    ratio("tok_s_vs_hf_generate_b1", lines.get((OURS, "fp32", 1)), lines.get((REFERENCE, "fp32", 1)), decode)
    ratio("tok_s_vs_hf_cb_b8", lines.get((OURS, "fp32", 8)), lines.get((CONTINUOUS, "fp32", 8)), decode)
    for precision in COMPARED:
        for batch in (1, 8):
            ours = lines.get((OURS, precision, batch))
            ratio(f"tok_s_vs_best_peer_b{batch}_{precision}", ours, best(precision, batch, decode), decode)
        ours = lines.get((OURS, precision, 8))
        ratio(f"prefill_tok_s_vs_best_peer_{precision}", ours, best(precision, 8, prefill), prefill)
    prefills = [found[name] for name in (f"prefill_tok_s_vs_best_peer_{p}" for p in COMPARED) if name in found]
    if prefills:
        found["prefill_tok_s_vs_best_peer"] = min(prefills)
    return found | _agreement(rows) | _steps(rows) | _pair(rows)


def table(rows: Rows) -> list[Line]:
    """One line per engine, precision and batch size, in the order of the rows.

    Disturbed turns are left out where at least half of the turns are not; the same rule for every engine.
    """
    turns = [row for row in rows if row["kind"] == "decode"]
    usual = statistics.median(_memory(row) for row in turns) if turns else 0.0
    grouped: dict[tuple[str, str, int], list[Row]] = {}
    for row in turns:
        grouped.setdefault((row["engine"], row["precision"], row["batch"]), []).append(row)
    lines = []
    for (engine, precision, batch), group in grouped.items():
        quiet = [row for row in group if _memory(row) >= DISTURBED * usual]
        counted = quiet if 2 * len(quiet) >= len(group) else group
        rates = [row["decode_tok_s"] for row in counted]
        prefill = statistics.median(row["prefill_tok_s"] for row in counted)
        middle = statistics.median(rates)
        lines.append(Line(engine, precision, batch, middle, min(rates), max(rates), prefill, len(counted)))
    return lines


def same_tokens(left: Sequence[Sequence[int]], right: Sequence[Sequence[int]]) -> float:
    """Share of places with equal tokens, of all places in either."""
    places = sum(max(len(a), len(b)) for a, b in zip(left, right, strict=True))
    return sum(a == b for x, y in zip(left, right, strict=True) for a, b in zip(x, y, strict=False)) / places


def _memory(row: Row) -> float:
    return float(min(row["probe_before_gb_s"], row["probe_after_gb_s"]))


def _agreement(rows: Rows) -> dict[str, float]:
    said = {(row["engine"], row["precision"]): row["tokens"] for row in rows if row["kind"] == "agreement"}
    ours, reference = said.get((OURS, "fp32")), said.get((REFERENCE, "fp32"))
    if ours is None or reference is None:
        return {}
    return {"identical_tokens_rate": round(same_tokens(ours, reference), 4)}


def _steps(rows: Rows) -> dict[str, float]:
    found = {}
    tree = {row["rows"]: statistics.median(row["ms"]) for row in rows if row["kind"] == "tree"}
    if 1 in tree and 8 in tree:
        found["tree8_cost_ratio"] = round(tree[8] / tree[1], 4)
    shares: dict[int, list[float]] = {}
    for row in rows:
        if row["kind"] == "overhead":
            shares.setdefault(row["batch"], []).append(row["outside_forward_share"])
    if shares:
        found["engine_overhead_share"] = round(max(statistics.median(of) for of in shares.values()), 4)
    return found


def _pair(rows: Rows) -> dict[str, float]:
    found = {}
    kv = [row for row in rows if row["kind"] == "kv"]
    tokens = sum(row["tokens"] for row in kv)
    if tokens:
        gap = sum((row["nll_int8"] - row["nll"]) * row["tokens"] for row in kv) / tokens
        found["kv_int8_nll_gap"] = round(gap, 5)
    for along, name in (("text", "draft_accepted_of_4"), ("continuation", "draft_accepted_of_4_continuation")):
        means = [_mean(row["runs"]) for row in rows if row["kind"] == "drafts" and row["along"] == along]
        if means:
            found[name] = round(statistics.fmean(means), 4)
    return found


def _mean(counts: Iterable[int]) -> float:
    """Mean of a histogram: ``counts[k]`` is how often k came."""
    counted = list(counts)
    return sum(k * count for k, count in enumerate(counted)) / sum(counted)
