"""``headrace bench soak``: hours of ordinary work in minutes of it: does memory grow, do slots leak, does the profile drift.

Mixed requests at a share of saturation go to the real server minute after minute. Between them both processes and the
engine's own counters are sampled. What counts as a leak or a drift is stated by :func:`verdict`, a pure function of the rows.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from headrace.bench import metrics
from headrace.bench.openloop.loads import drawn_load, with_classes
from headrace.bench.openloop.served import Served
from headrace.bench.openloop.sweep import Pace, Sweep
from headrace.bench.openloop.systems import HTTPSystem
from headrace.bench.results import Result, new_result
from headrace.bench.sampler import Sampler
from headrace.bench.serve import OURS, Setting, model_of
from headrace.bench.simulation.prediction import drift
from headrace.core.errors import InvalidRequest

Rows = Sequence[Mapping[str, Any]]

SAMPLE_S = 2.0
REST_S = 1.0
SATURATE_S = 15.0
"""Length of the run that the load is a share of: a short one on a machine with moods would overload it for the rest of the soak."""

SETTLED = 0.25
"""Share of a soak that is warm-up: caches fill, pools grow to their size, the prefix cache takes its slots."""

HELD = ("server_fds", "engine_fds", "server_threads", "engine_threads")

MIB = 1 << 20
LEAK_MIB_PER_HOUR = 60.0
LEAK_SHARE = 0.02
DRIFT_ERROR = 0.15
LATENCY_GROWTH = 1.5


@dataclass(frozen=True, slots=True)
class Soak:
    """How long and how hard.

    Attributes:
        minutes: of load, after saturation was found.
        load: share of saturation.
        round_s: length of a round; between rounds everything must come to rest.
        kv_gib: of the server's K and V: small, so that the prefix cache is full within the first minutes and evicts for the
            rest of the time. Memory that still grows then is a leak.
    """

    minutes: float = 20.0
    load: float = 0.8
    round_s: float = 30.0
    kv_gib: float = 0.25

    def __post_init__(self) -> None:
        for name in ("minutes", "load", "round_s", "kv_gib"):
            if not getattr(self, name) > 0:
                raise InvalidRequest(f"{name} is {getattr(self, name)}: give a number above 0", field=name)


def run(setting: Setting, soak: Soak, *, report: Callable[[str], None] = lambda line: None) -> Result:
    """Soak the server.

    Rows: ``saturation`` and ``lone``, ``sample`` (every two seconds), ``round`` (latencies, and what is held at rest).

    An interrupted soak returns what it has, marked ``partial``.
    """
    load_before = os.getloadavg()
    rows: list[dict[str, Any]] = []
    partial = False
    try:
        options = ["--policy", setting.policy, "--kv-gib", str(soak.kv_gib), *setting.options()]
        with Served(setting.model, options) as served:
            _soak(setting, soak, served, rows, report)
    except KeyboardInterrupt:
        partial = True
    return replace(new_result("soak", rows, claims, load_before), partial=partial)


def _soak(
    setting: Setting, soak: Soak, served: Served, rows: list[dict[str, Any]], report: Callable[[str], None]
) -> None:
    model = model_of(setting, served)
    sweep = Sweep(model, Pace(saturate_s=SATURATE_S), setting.seed, rows, report)
    ours = HTTPSystem(OURS, served.url, served.model, served)
    drawn = drawn_load(model.context, seed=setting.seed)
    lone = sweep.lone(ours, drawn)
    rate = sweep.saturation(ours, drawn) * soak.load
    begun, number = time.monotonic(), 0

    def look() -> None:
        if found := sample(served):
            rows.append({"kind": "sample", "at_s": round(time.monotonic() - begun, 2), **found})

    while (passed := time.monotonic() - begun) < soak.minutes * 60:
        seconds = min(soak.round_s, soak.minutes * 60 - passed)
        report(f"minute {passed / 60:.1f} of {soak.minutes:g}: {rate:.1f} requests/s")
        arrivals = with_classes(drawn.piece(rate, seconds, seed=number, most=100_000), lone, seed=number)
        shots = model.shots(arrivals, seed=10_000 + number)
        with Sampler(look, SAMPLE_S):
            replayed = ours.replay(shots, cutoff_s=seconds + 10.0)
        time.sleep(REST_S)
        rows.append(round_row(number, passed, replayed.rows, replayed.client, _at_rest(served)))
        if not served.alive:
            return
        number += 1


def round_row(
    number: int, at_s: float, requests: Rows, client: Mapping[str, Any], rest: Mapping[str, float]
) -> dict[str, Any]:
    """One round: latencies of its requests, and what the server holds once they have all ended."""
    found = metrics.summary(requests)
    kept = (
        "requests",
        "finished",
        "attainment",
        "throughput_tok_s",
        "ttft_ms_p50",
        "ttft_ms_p99",
        "tpot_ms_p50",
        "tpot_ms_p99",
    )
    errors = sorted({str(r["error"]) for r in requests if r.get("error")})
    latencies = {name: round(found[name], 4) for name in kept if found[name] == found[name]}
    return {"kind": "round", "number": number, "at_s": round(at_s, 2), **latencies, "errors": errors[:5],
            "late": client.get("late"), **rest}  # fmt: skip


def _at_rest(served: Served) -> dict[str, float]:
    held = sample(served)
    held |= {"open_requests": served.stats().get("open_requests", 0.0)}
    wanted = ("slots_used", "running_sequences", "waiting_sequences", "open_requests", *HELD)
    return {f"rest_{name}": held[name] for name in wanted if name in held}


def sample(served: Served) -> dict[str, float]:
    """Memory in MiB, open files and threads of server and engine, and the engine's counters; empty once they are gone."""
    import psutil

    found: dict[str, float] = {}
    try:
        for name, process in served.processes().items():
            found[f"{name}_rss_mib"] = round(process.memory_info().rss / MIB, 2)
            found[f"{name}_fds"] = process.num_fds()
            found[f"{name}_threads"] = process.num_threads()
    except psutil.Error:
        return {}
    stats = served.stats()
    wanted = ("slots", "slots_used", "slots_cached", "slots_free", "running_sequences", "waiting_sequences",
              "engine_steps", "profile_error_p50", "profile_predicted_seconds", "profile_measured_seconds")  # fmt: skip
    return {**found, **{name: round(stats[name], 4) for name in wanted if name in stats}}


def verdict(rows: Rows) -> dict[str, float]:
    """Leak or no leak, drift or no drift, from the samples after the first quarter and the rounds.

    Keys are 1.0 (true) or 0.0:

    - ``leak_memory``: the robust slope (Theil-Sen) of either process's RSS is above 60 MiB an hour and it gained more than 2 %
      over the time.
    - ``leak_files``: at rest after a round, more open files or threads in the last third (median) than ever in the first third, by
      3 or more. Under load each open request has a file.
    - ``leak_slots``: after any round slots are held, or sequences or requests open, although nothing is asked.
    - ``drift_profile``: the median error of step predictions in the last third is above 15 % and above that of the first
      third by half, or predictions lean (sum of predicted over sum of measured) by 15 points more to one side at the end.
    - ``drift_latency``: TPOT p50 of the last third of rounds is more than 1.5 times that of the first third.
    """
    settled = _settled(rows)
    rounds = [r for r in rows if r["kind"] == "round"]
    grown = any(_grows(settled, f"{name}_rss_mib") for name in ("server", "engine"))
    held = any(
        r.get(f"rest_{n}", 0) > 0 for r in rounds for n in ("slots_used", "running_sequences", "waiting_sequences")
    )
    files = any(_climbs(rounds, settled, name) for name in HELD)
    errors = [r["profile_error_p50"] for r in settled if "profile_error_p50" in r]
    first, last = _thirds(errors)
    leaning = abs(drift(settled).get("profile_bias_drift", 0.0)) > DRIFT_ERROR
    early, late = _thirds([r["tpot_ms_p50"] for r in rounds if "tpot_ms_p50" in r])
    return {
        "leak_memory": float(grown),
        "leak_files": float(files),
        "leak_slots": float(held),
        "drift_profile": float(leaning or (last > DRIFT_ERROR and last > 1.5 * first)),
        "drift_latency": float(early > 0 and late > LATENCY_GROWTH * early),
    }


def claims(rows: Rows) -> dict[str, float]:
    """The verdict with the figures it rests on: slopes in MiB an hour, the profile's error, requests lost, minutes and load."""
    rounds = [r for r in rows if r["kind"] == "round"]
    settled = _settled(rows)
    if not rounds or not settled:
        return {}
    found = dict(verdict(rows))
    for name in ("server", "engine"):
        found[f"{name}_rss_mib_per_hour"] = slope_per_hour(settled, f"{name}_rss_mib")
    errors = [r["profile_error_p50"] for r in settled if "profile_error_p50" in r]
    if errors:
        found["profile_error_p50_first_third"], found["profile_error_p50_last_third"] = _thirds(errors)
    found |= drift(settled)
    asked = sum(r["requests"] for r in rounds)
    found["requests"] = asked
    found["requests_lost"] = asked - sum(r["finished"] for r in rounds)
    found["minutes"] = max(r["at_s"] for r in rows if r["kind"] in ("sample", "round")) / 60
    return {name: round(value, 4) for name, value in found.items()}


def slope_per_hour(rows: Rows, name: str) -> float:
    """Theil-Sen slope of ``name`` over ``at_s``, per hour: the median of the slopes of all pairs, which outliers do not move."""
    points = [(r["at_s"], r[name]) for r in rows if name in r]
    step = max(1, len(points) // 200)  # 200 points give 20,000 pairs, plenty
    points = points[::step]
    slopes = [(y - x) / (b - a) for i, (a, x) in enumerate(points) for b, y in points[i + 1 :] if b > a]
    return statistics.median(slopes) * 3600 if slopes else 0.0


def _settled(rows: Rows) -> list[Mapping[str, Any]]:
    samples = [r for r in rows if r["kind"] == "sample"]
    end = max((r["at_s"] for r in samples), default=0.0)
    return [r for r in samples if r["at_s"] >= SETTLED * end]


def _grows(rows: Rows, name: str) -> bool:
    values = [r[name] for r in rows if name in r]
    if len(values) < 10:
        return False
    tenth = max(1, len(values) // 10)
    gained = statistics.median(values[-tenth:]) / statistics.median(values[:tenth]) - 1
    return slope_per_hour(rows, name) > LEAK_MIB_PER_HOUR and gained > LEAK_SHARE


def _climbs(rounds: Rows, samples: Rows, name: str) -> bool:
    """Whether more of ``name`` is held in the last third: at rest, or where that is not known, at the least under load."""
    values = [r[f"rest_{name}"] for r in rounds if f"rest_{name}" in r]
    if values:
        third = len(values) // 3
        return third > 0 and statistics.median(values[-third:]) >= max(values[:third]) + 3
    values = [r[name] for r in samples if name in r]
    third = len(values) // 3
    return third > 0 and min(values[-third:]) >= min(values[:third]) + 3


def _thirds(values: Sequence[float]) -> tuple[float, float]:
    """Medians of the first and the last third; zeros of too few."""
    third = len(values) // 3
    return (statistics.median(values[:third]), statistics.median(values[-third:])) if third else (0.0, 0.0)


def panels(rows: Rows) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Curves over minutes: memory above its start, slots, the profile's error, and latency per round."""
    samples = [r for r in rows if r["kind"] == "sample"]
    rounds = [r for r in rows if r["kind"] == "round"]

    def curve(of: Rows, name: str, *, base: float = 0.0) -> list[tuple[float, float]]:
        return [(r["at_s"] / 60, r[name] - base) for r in of if name in r]

    return {
        "memory, MiB": {n: curve(samples, f"{n}_rss_mib") for n in ("server", "engine")},
        "slots": {n: curve(samples, f"slots_{n}") for n in ("used", "cached")},
        "open files": {n: curve(samples, f"{n}_fds") for n in ("server", "engine")},
        "profile error p50": {"error": curve(samples, "profile_error_p50")},
        "TPOT, ms": {q: curve(rounds, f"tpot_ms_{q}") for q in ("p50", "p99")},
        "TTFT, ms": {q: curve(rounds, f"ttft_ms_{q}") for q in ("p50", "p99")},
    }
