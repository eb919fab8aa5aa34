"""``headrace bench adaserve``: latency targets under load, with and without speculation, simulated and on this machine."""

from __future__ import annotations

import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from headrace.bench.adaserve.cells import Sweep
    from headrace.bench.adaserve.real import Setting
    from headrace.bench.results import Result

SIMULATED, REAL = "Simulated part", "Real part"


def adaserve(
    trace: Annotated[
        Path,
        typer.Option(
            help="JSON lines {emission_time_ms, prompt | input_length, output_length, slo_ratio | slo}; .gz, .xz."
        ),
    ],
    part: Annotated[
        list[str] | None,
        typer.Option(
            help="simulated, real, identity or peer; may be repeated. All by default; rows of others are kept."
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A minute simulated, a minute and a half real.")] = False,
    policy: Annotated[list[str] | None, typer.Option(help="A policy; may be repeated. All by default.")] = None,
    json_path: Annotated[Path, typer.Option("--json", help="Where to write the result; plots go beside it.")] = Path(
        "results/adaserve.json"
    ),
    model: Annotated[
        list[str] | None,
        typer.Option(help="llama or qwen; may be repeated. Both by default.", rich_help_panel=SIMULATED),
    ] = None,
    rate: Annotated[
        list[float] | None,
        typer.Option(help="Requests per second; may be repeated. The paper's by default.", rich_help_panel=SIMULATED),
    ] = None,
    requests: Annotated[
        int | None, typer.Option(min=1, help="Requests of each replay; all by default.", rich_help_panel=SIMULATED)
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Draws of the drafts' fates.", rich_help_panel=SIMULATED)] = 1,
    workers: Annotated[int, typer.Option(min=1, help="Replays at once.", rich_help_panel=SIMULATED)] = 2,
    again: Annotated[
        bool, typer.Option("--again", help="Replay what an earlier run has replayed.", rich_help_panel=SIMULATED)
    ] = False,
    shape: Annotated[
        str, typer.Option(help="Whose cost the target has: 0.3b, 0.5b or 125m.", rich_help_panel=REAL)
    ] = "0.3b",
    precision: Annotated[
        str, typer.Option(help="The target's weights: int8 or float32.", rich_help_panel=REAL)
    ] = "int8",
    load: Annotated[
        list[float] | None,
        typer.Option(help="Share of saturation without drafts; may be repeated.", rich_help_panel=REAL),
    ] = None,
    seconds: Annotated[float | None, typer.Option(min=1, help="Of arrivals in a run.", rich_help_panel=REAL)] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; all by default.", rich_help_panel=REAL)
    ] = None,
) -> None:
    """SLO attainment and goodput of every policy on AdaServe's workload: on simulated GPUs, then on this machine."""
    from headrace.bench.adaserve import drawing, run
    from headrace.bench.plots import need_matplotlib

    need_matplotlib()  # a missing package shall not cost a run
    plan = run.Plan(
        trace=trace,
        sweep=_sweep(model, policy, rate, requests, seeds),
        real=_setting(policy, shape, precision, load, seconds, threads, quick),
        parts=tuple(part or run.PARTS),
        workers=workers,
        again=again,
        quick=quick,
    )
    kept = run.rows_of(json_path) if part else []
    result = _with_progress(plan, kept)
    result.write(json_path)
    plots = drawing.draw(result.rows, json_path)
    _print(result)
    _end(result, [json_path, *plots])


def _sweep(
    models: list[str] | None, policies: list[str] | None, rates: list[float] | None, count: int | None, seeds: int,
) -> Sweep:  # fmt: skip
    from headrace.bench.adaserve import cells
    from headrace.bench.adaserve.setups import POLICIES, SETUPS, policy_named
    from headrace.core.errors import InvalidRequest

    for name in models or ():
        if name not in SETUPS:
            raise InvalidRequest(f"model is {name!r}: choose {' or '.join(SETUPS)}", field="model")
    for name in policies or ():
        policy_named(name)
    if any(not rate > 0 for rate in rates or ()):
        raise InvalidRequest(f"rate is {rates}: give requests per second above 0", field="rate")
    sweep = cells.Sweep(
        models=tuple(models or SETUPS), policies=tuple(policies or POLICIES), rates=tuple(rates or ()), count=count,
        seeds=tuple(range(seeds)),
    )  # fmt: skip
    if policies:
        sweep = replace(sweep, ablations=())
    return sweep


def _setting(
    policies: list[str] | None, shape: str, precision: str, loads: list[float] | None, seconds: float | None,
    threads: int | None, quick: bool,
) -> Setting:  # fmt: skip
    from headrace.bench.adaserve import real
    from headrace.bench.adaserve.pair import Target
    from headrace.bench.checkpoints.shapes import shape_named
    from headrace.core.errors import InvalidRequest

    if precision not in ("int8", "float32"):
        raise InvalidRequest(f"precision is {precision!r}: choose int8 or float32", field="precision")
    if any(not load > 0 for load in loads or ()):
        raise InvalidRequest(f"load is {loads}: give shares above 0", field="load")
    shape_named(shape)
    setting = real.QUICK if quick else real.Setting()
    known = [name for name in policies or setting.policies if name in real.POLICIES]
    return replace(
        setting,
        target=Target(shape, "int8" if precision == "int8" else None, threads=threads),
        policies=tuple(known or setting.policies),
        loads=tuple(loads or setting.loads),
        seconds=seconds or setting.seconds,
    )


def _with_progress(plan: Any, kept: list[dict[str, Any]]) -> Result:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from headrace.bench.adaserve import run

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn())
    console = Console(stderr=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite end keeps what was measured
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bar:
        task = bar.add_task("starting", total=None)
        begun = time.monotonic()

        def report(line: str, done: int, total: int) -> None:
            bar.update(task, description=line, completed=done, total=total or None)
            if not console.is_terminal:
                count = f"{done}/{total} " if total else ""
                console.print(f"{time.monotonic() - begun:6.1f} s  {count}{line}", style="dim", soft_wrap=True)

        return run.run(plan, report=report, kept=kept)


def _print(result: Result) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("claim")
    table.add_column("value", justify="right")
    for name, value in result.claims.items():
        if not name.startswith(("sim_attainment_", "sim_ablation_")):
            table.add_row(name, f"{value:g}")
    Console(stderr=True).print(table)


def _end(result: Result, written: list[Path]) -> None:
    import json

    from rich.console import Console

    console = Console(stderr=True)
    if result.partial:
        console.print("interrupted: the file holds what was measured until then", style="yellow")
    console.print(f"written to {', '.join(map(str, written))}", style="dim")
    print(json.dumps(result.claims))
    if result.partial:
        raise typer.Exit(130)
