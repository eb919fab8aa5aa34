"""``headrace bench adaserve``: latency targets under load, with and without speculation, simulated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def adaserve(
    trace: Annotated[
        Path,
        typer.Option(help="JSON lines {emission_time_ms, input_length, output_length, slo_ratio | slo}; .gz, .xz."),
    ],
    policy: Annotated[list[str] | None, typer.Option(help="A policy; may be repeated. All by default.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="llama or qwen; may be repeated. Both by default.")] = None,
    rate: Annotated[
        list[float] | None, typer.Option(help="Requests per second; may be repeated. The paper's by default.")
    ] = None,
    requests: Annotated[
        int | None, typer.Option(min=1, help="Requests of each replay; the whole trace by default.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Draws of the drafts' fates.")] = 1,
    workers: Annotated[int, typer.Option(min=1, help="Replays at once.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="Within 90 seconds: the highest rates, few requests.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the curves into this PNG.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Where to write the result.")] = None,
) -> None:
    """SLO attainment and goodput of every policy on AdaServe's workload, on simulated GPUs with fitted drafts."""
    from rich.console import Console

    from headrace.bench import adaserve as bench
    from headrace.bench.plots import write_curves
    from headrace.compose import get_policy
    from headrace.core.errors import InvalidRequest

    for name in model or ():
        if name not in bench.SETUPS:
            raise InvalidRequest(f"model is {name!r}: choose {' or '.join(bench.SETUPS)}", field="model")
    for name in policy or ():
        get_policy(bench.REPLICAS.get(name, name))
    sweep = bench.Sweep(
        models=tuple(model or bench.SETUPS),
        policies=tuple(policy or bench.POLICIES),
        rates=tuple(rate or ()),
        count=requests,
        seeds=tuple(range(seeds)),
    )
    if quick:
        sweep = bench.quick(sweep)
    console = Console(stderr=True)
    with console.status("replaying") as status:
        result = bench.run(sweep, trace, workers=workers, report=status.update)
    path = json_path or Path("results/adaserve.json")
    result.write(path)
    if plot is not None:
        write_curves(plot, bench.panels(result.rows), x_label="requests/s", title="simulated")
    console.print(f"written to {path}", style="dim")
    print(json.dumps(result.claims))
