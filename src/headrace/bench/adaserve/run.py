"""Both parts in one run: simulated first, then real, then peers; rows as they come, a file at any time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from headrace.bench.adaserve import real
from headrace.bench.adaserve.cells import Sweep, quick
from headrace.bench.adaserve.claims import simulated_claims
from headrace.bench.adaserve.journal import Journal
from headrace.bench.adaserve.realclaims import real_claims
from headrace.bench.adaserve.simulated import measure as simulate
from headrace.bench.adaserve.simulated import pace_of
from headrace.bench.results import Result, Rows, new_result
from headrace.core.errors import InvalidRequest

PARTS = ("simulated", "real", "identity", "peer")
KINDS = {
    "simulated": ("simulated",),
    "real": ("machine", "curve", "real"),
    "identity": ("identity",),
    "peer": ("assisted",),
}
"""Part -> the kinds of its rows."""

Report = Callable[[str, int, int], None]
"""Told what goes on, how much is done, and how much there is."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A run.

    Attributes:
        trace: the workload.
        sweep: the simulated part.
        real: the real part, its identity and its peer.
        parts: of :data:`PARTS`, those to measure.
        workers: replays at once.
        again: forget what the journal of replays holds.
        quick: replay a part of the sweep alone.
    """

    trace: Path
    sweep: Sweep = field(default_factory=Sweep)
    real: real.Setting = field(default_factory=real.Setting)
    parts: tuple[str, ...] = PARTS
    workers: int = 1
    again: bool = False
    quick: bool = False

    def __post_init__(self) -> None:
        for part in self.parts:
            if part not in PARTS:
                raise InvalidRequest(f"no part {part!r}: there are {', '.join(PARTS)}", field="part")


def run(plan: Plan, *, report: Report = lambda line, done, total: None, kept: Rows = ()) -> Result:
    """Measure the plan's parts.

    An interruption (Ctrl-C) ends it; the result then holds what was measured and says ``partial``. Replays that were done are found
    again by the next run.

    Args:
        report: see :data:`Report`.
        kept: rows of an earlier run; those of parts that this one leaves out are taken over.

    Raises:
        HeadraceError: the trace cannot be read, or the pair cannot be built.
    """
    load_before = os.getloadavg()
    wanted = {kind for part in plan.parts for kind in KINDS[part]}
    left_out = {kind for kinds in KINDS.values() for kind in kinds} - wanted
    rows: list[dict[str, Any]] = [dict(row) for row in kept if row.get("kind") in left_out]
    partial = False
    try:
        for part in _parts(plan, report):
            rows.extend(part)
    except KeyboardInterrupt:
        partial = True
    result = new_result("adaserve", rows, claims, load_before)
    result.partial = partial
    return result


def _parts(plan: Plan, report: Report) -> Iterable[Iterable[dict[str, Any]]]:
    pace = pace_of(plan.trace)  # a bad file is found before anything is measured
    if "simulated" in plan.parts:
        sweep = replace(plan.sweep, pace=pace)
        sweep = quick(sweep) if plan.quick else sweep
        journal = Journal.of(plan.trace, again=plan.again)
        yield simulate(sweep, plan.trace, workers=plan.workers, journal=journal, report=report)
    if "identity" in plan.parts:
        from headrace.bench.adaserve.identity import identity_rows

        yield identity_rows(plan.trace, plan.real.policies, plan.real.identity, lambda line: report(line, 0, 0))
    if "real" in plan.parts or "peer" in plan.parts:
        served = "real" in plan.parts
        yield real.measure(plan.real, plan.trace, served=served, peer="peer" in plan.parts, report=report)


def claims(rows: Rows) -> dict[str, float]:
    """All claims that the rows support."""
    return simulated_claims(rows) | real_claims(rows)


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Rows of an earlier run's file; none when there is no such file.

    Raises:
        InvalidRequest: the file is something else.
    """
    if not path.is_file():
        return []
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["name"] != "adaserve":
            raise ValueError(f"it is of {data['name']!r}")
        rows: list[dict[str, Any]] = data["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidRequest(
            f"{path} is no result of headrace bench adaserve ({error}): choose another --json", field="json"
        ) from error
    return rows
