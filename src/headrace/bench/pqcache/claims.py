"""What ``headrace bench pqcache`` claims, computed from its rows alone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from headrace.bench.pqcache.quality_claims import quality_claims

Rows = Sequence[Mapping[str, Any]]

KIB = 1024


def claims(rows: Rows) -> dict[str, float]:
    """Of both halves, as far as there are rows for them."""
    speed = [row for row in rows if row["part"] == "speed"]
    quality = [row for row in rows if row["part"] == "quality"]
    return {**(speed_claims(speed) if speed else {}), **(quality_claims(quality) if quality else {})}


def speed_claims(rows: Rows) -> dict[str, float]:
    """Ratios of medians; a speed-up above 1 is in the sketch's favour."""
    made: dict[str, float] = {}
    attention = [row for row in rows if row["kind"] == "attention"]
    for length in sorted({row["context"] for row in attention}):
        mine = [row for row in attention if row["context"] == length]
        dense = _median(mine, "dense")
        made[f"attn_decode_speedup_{length // KIB}k"] = dense / _median(mine, "pq 2x6")
        made[f"attn_decode_speedup_4x8_{length // KIB}k"] = dense / _median(mine, "pq 4x8")
        made[f"overhead_{length // KIB}k"] = _median(mine, "dispatched") / dense
    steps = [row for row in rows if row["kind"] == "step"]
    for length in sorted({row["context"] for row in steps}):
        mine = [row for row in steps if row["context"] == length]
        sizes = {row["system"]: row["bytes"] for row in mine}
        made[f"step_speedup_{length // KIB}k"] = _median(mine, "dense") / _median(mine, "pq")
        made[f"step_speedup_bound_{length // KIB}k"] = sizes["dense"] / sizes["pq"]
    memory = [row for row in rows if row["kind"] == "memory"]
    if memory:
        made["fast_tier_bytes_error"] = max(abs(row["bytes"] / row["formula"] - 1.0) for row in memory)
    if long := [row for row in memory if row["context"] >= 32 * KIB]:
        made["fast_tier_share"] = max(row["bytes"] / row["full"] for row in long)
    made.update(_building(rows))
    return {name: round(value, 4) for name, value in made.items()}


def _building(rows: Rows) -> dict[str, float]:
    prefill = [row["ms"] for row in rows if row["kind"] == "prefill"]
    build = {(row["codes"], row["system"]): row["ms"] for row in rows if row["kind"] == "build"}
    if not prefill or not build:
        return {}
    made = {}
    for codes in dict.fromkeys(codes for codes, _ in build):
        extra = build[codes, "first step"] - build[codes, "next step"]
        name = "" if codes == "2x6" else f"_{codes}"
        made[f"build_share_of_prefill{name}"] = extra / prefill[0]
        made[f"tt2t_ratio{name}"] = (prefill[0] + build[codes, "first step"]) / (prefill[0] + build[codes, "next step"])
    return made


def _median(rows: Rows, system: str) -> float:
    return float(statistics.median(row["ms"] for row in rows if row["system"] == system))
