"""What the simulation of a benchmark run needs: a profile measured in that run, and how fast simulated time passes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.bench.simulate import Simulation, own_rate, replay
from headrace.bench.simulation.machines import get_machine
from headrace.bench.workloads.arrivals import Arrival, poisson, rescaled, truncated, within_context
from headrace.bench.workloads.traces import load_trace
from headrace.core.errors import EngineUnavailable
from headrace.profiling import store

if TYPE_CHECKING:
    from headrace.core.protocols import Profile

LIMIT_S = 600.0
LONG = 20_000
MACHINE = "linear"
FIRST = 500


def measured_profile(
    model: str,
    options: Sequence[str],
    rows: list[dict[str, Any]],
    *,
    repeats: int = 5,
    seconds: float = 60.0,
) -> Profile:
    """Measure a model's profile in a process of its own; steps outside the grid become rows of kind ``profile``.

    Args:
        model: folder, hub name or ``bundled``.
        options: of ``headrace profile``, as the engine to be simulated runs.
        repeats: timings of every step.
        seconds: after which no further round of them begins.

    Raises:
        EngineUnavailable: it failed; the message has its last line.
    """
    command = [sys.executable, "-m", "headrace", "profile", model, "--json", "--again", "--repeats", str(repeats),
               "--max-seconds", str(seconds), *options]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        raise EngineUnavailable(f"headrace profile failed: {said[-1]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    rows.extend({"kind": "profile", **row} for row in found["held_out"])
    return store.read(Path(found["file"]))


def simulation_pace(traces: Sequence[Path], *, seconds: float) -> dict[str, Any]:
    """How fast a long trace is simulated: a row of kind ``simulation`` with ``virtual_s`` and ``wall_s``.

    The first trace with CSV times is taken, or one is drawn of the same density as Azure's hour of conversations, on a machine that
    keeps up with it, so that it is the engine that is timed. It is cut so that it takes about ``seconds``, judged by its first part.
    """
    recorded = next((path for path in traces if ".csv" in path.suffixes), None)
    arrivals = _azure_like() if recorded is None else load_trace(recorded)
    simulation = Simulation(policies=("chunked",))
    paced: list[Arrival] = rescaled(within_context(arrivals, simulation.context), own_rate(arrivals))
    profile, rate = get_machine(MACHINE), own_rate(arrivals)
    started = time.perf_counter()
    replay(simulation, truncated(paced, count=FIRST), profile, "chunked", rate)
    each = (time.perf_counter() - started) / min(FIRST, len(paced))
    part = truncated(paced, count=max(FIRST, int(seconds / each)))
    run = replay(simulation, part, profile, "chunked", rate)[-1]
    return {"kind": "simulation", "trace": recorded.name.split(".")[0] if recorded else "drawn", "machine": MACHINE,
            "requests": len(part), **{k: round(run[k], 3) for k in ("virtual_s", "wall_s", "steps")}}  # fmt: skip


def _azure_like() -> list[Arrival]:
    return poisson(5.53, LONG, seed=0, lengths=[(1154, 211), (400, 120), (2000, 300)])
