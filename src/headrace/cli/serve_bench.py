"""``headrace bench serve`` and ``headrace bench soak``: the real server under load."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from headrace.bench.results import Result
    from headrace.bench.serve import Setting

Model = Annotated[str, typer.Option(help="Folder, hub name, or bundled.", metavar="NAME")]
Seed = Annotated[int, typer.Option(help="Seed of arrivals, lengths, classes and tokens.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads of every system; all by default.")]
Policy = Annotated[str, typer.Option(help="Who runs in a step of the server.", metavar="NAME")]
Longest = Annotated[int, typer.Option(min=8, help="Prompt plus output tokens that lengths are scaled to fit.")]


def serve(
    quick: Annotated[bool, typer.Option("--quick", help="Within 90 seconds: fewer repeats, smaller shapes.")] = False,
    seed: Seed = 0,
    json_path: Annotated[Path, typer.Option("--json", help="Where to write the result; plots go beside it.")] = Path(
        "results/serve.json"
    ),
    trace: Annotated[
        list[Path] | None,
        typer.Option(
            help="Azure, Mooncake or AdaServe trace, or JSON lines {emission_time_ms, prompt | input_length, output_length, slo}; "
            "may be given again."
        ),
    ] = None,
    peers: Annotated[Path | None, typer.Option(help="Folder of installed peer engines.")] = None,
    model: Model = "bundled",
    checkpoint: Annotated[
        Path | None, typer.Option(help="What the closed loop runs on; by default a 125M shape with random weights.")
    ] = None,
    skip: Annotated[
        list[str] | None, typer.Option(help="closed, sweep, peers or simulation; may be given again.")
    ] = None,
    policy: Policy = "chunked",
    longest: Longest = 512,
    seconds: Annotated[float, typer.Option(min=0.5, help="Length of each piece of the sweep.")] = 5.0,
    closed_seconds: Annotated[float, typer.Option(min=1, help="Begin no closed-loop round after this long.")] = 330.0,
    sweep_seconds: Annotated[float, typer.Option(min=1, help="Begin no round of the sweep after this long.")] = 480.0,
    threads: Threads = None,
) -> None:
    """Speed in a closed loop, a load sweep of the real server beside its peers, and simulation held against it."""
    from headrace.bench import serve as bench
    from headrace.bench.closedloop import decode
    from headrace.bench.openloop.sweep import Pace
    from headrace.bench.plots import need_matplotlib, write_curves

    need_matplotlib()  # a missing package shall not cost a run
    setting = bench.Setting(
        model=model, seed=seed, traces=tuple(trace or ()), peers=peers, skip=frozenset(skip or ()), policy=policy,
        longest=longest, quick=quick, threads=threads, pace=Pace(seconds=seconds, budget_s=sweep_seconds),
        closed=decode.Setting(
            checkpoint=checkpoint, folder=peers, threads=threads, seed=seed, new=64,
            budget_s=None if quick else closed_seconds,
        ),
    )  # fmt: skip
    result = _with_progress(lambda report, on_part: bench.run(setting, report=report, on_part=on_part))
    result.write(json_path)
    plot = json_path.with_suffix(".png")
    panels = {name: series for name, series in bench.panels(result.rows).items() if series}
    if panels:
        write_curves(plot, panels, x_label="requests/s", title=f"{model}, open loop")
    _print_closed(result)
    _print_sweep(result)
    _print_simulation(result)
    _end(result, json_path, plot if panels else None)


def soak(
    minutes: Annotated[float, typer.Option(help="Minutes of load.")] = 20.0,
    load: Annotated[float, typer.Option(help="Share of saturation.")] = 0.8,
    json_path: Annotated[
        Path, typer.Option("--json", help="Where to write the result; the plot goes beside it.")
    ] = Path("results/soak.json"),
    model: Model = "bundled",
    seed: Seed = 0,
    policy: Policy = "chunked",
    longest: Longest = 512,
    threads: Threads = None,
) -> None:
    """Keep the real server under load and say whether it leaks memory, files or slots, or drifts from its profile."""
    from headrace.bench import serve as bench
    from headrace.bench import soak as soak_bench
    from headrace.bench.plots import need_matplotlib, write_curves

    need_matplotlib()
    how = soak_bench.Soak(minutes, load)
    setting: Setting = bench.Setting(model=model, seed=seed, policy=policy, longest=longest, threads=threads)
    result = _with_progress(lambda report, on_part: soak_bench.run(setting, how, report=report))
    result.write(json_path)
    plot = json_path.with_suffix(".png")
    write_curves(plot, soak_bench.panels(result.rows), x_label="minutes", title=f"{model} at {load:g} of saturation")
    _print_soak(result)
    _end(result, json_path, plot)


def _with_progress(measure: Any) -> Result:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=20), TimeElapsedColumn())
    console = Console(stderr=True)
    # A polite end is an interruption too: servers are stopped and the file is written.
    # Shells start background jobs with SIGINT ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=None)
        begun = time.monotonic()

        def report(line: str) -> None:
            bar.update(task, description=line)
            if not console.is_terminal:
                console.print(f"{time.monotonic() - begun:6.1f} s  {line}", style="dim", soft_wrap=True)

        result: Result = measure(report, lambda done, total: bar.update(task, completed=done, total=total))
    return result


def _end(result: Result, path: Path, plot: Path | None) -> None:
    from rich.console import Console

    console = Console(stderr=True)
    if result.partial:
        console.print("interrupted: the file holds what was measured until then", style="yellow")
    console.print(f"written to {path}" + (f" and {plot}" if plot else ""), style="dim")
    print(json.dumps(result.claims))
    if result.partial:
        raise typer.Exit(130)


def _table(rows: list[list[str]], titles: list[str], texts: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for number, title in enumerate(titles):
        table.add_column(title, justify="left" if number < texts else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=max(Console().width, 120)).print(table)  # a pipe has no width, and cut figures are of no use


def _print_closed(result: Result) -> None:
    from headrace.bench.closedloop.claims import table

    lines = [
        [line.engine, line.precision, str(line.batch), f"{line.decode:.1f}", f"{line.low:.1f} to {line.high:.1f}",
         f"{line.prefill:.0f}", str(line.turns)]
        for line in table(result.rows)
    ]  # fmt: skip
    if lines:
        _table(lines, ["engine", "weights", "batch", "decode tok/s", "range", "prefill tok/s", "turns"], 2)
    for row in result.rows:
        if row["kind"] == "lost":
            typer.echo(f"{row['engine']} {row['precision']}: {row['why']}", err=True)


def _print_sweep(result: Result) -> None:
    from headrace.bench.openloop.sweep import by_point, figures

    rates = {(r["load"], r["fraction"]): r["rate"] for r in result.rows if r["kind"] == "run"}
    lines = []
    for (load, system, fraction), rows in by_point(result.rows).items():
        f = figures(rows)
        lines.append(
            [load, system, f"{fraction:g}", f"{rates[load, fraction]:.1f}", f"{f['requests']:.0f}", f"{f['attainment']:.1%}",
             f"{f['goodput_tok_s']:.0f}", f"{f['throughput_tok_s']:.0f}",
             *(f"{f[n]:.1f}" for n in ("ttft_ms_p50", "ttft_ms_p90", "ttft_ms_p99", "tpot_ms_p50", "tpot_ms_p90", "tpot_ms_p99"))]
        )  # fmt: skip
    if lines:
        titles = ["load", "system", "of full", "req/s", "requests", "attained", "goodput", "tok/s", "TTFT p50", "p90", "p99 ms",
                  "TPOT p50", "p90", "p99 ms"]  # fmt: skip
        _table(lines, titles, 2)
    for row in result.rows:
        if row["kind"] == "skipped":
            typer.echo(f"{row['system']}: {row['reason']}", err=True)


def _print_simulation(result: Result) -> None:
    from headrace.bench.simulation.against_real import compare

    def percent(point: dict[str, Any], name: str) -> str:
        return f"{point[name]:.0%}" if name in point else ""

    lines = [
        [p["load"], f"{p['fraction']:g}", str(p["requests"]), f"{p['real']:.1%}", f"{p['simulated']:.1%}", f"{p['error_points']:.1f}",
         *(percent(p, f"{n}_error") for n in ("ttft_ms_p50", "ttft_ms_p90", "tpot_ms_p50", "tpot_ms_p90"))]
        for p in compare(result.rows)
    ]  # fmt: skip
    if lines:
        titles = [
            "load",
            "of full",
            "requests",
            "attained",
            "simulated",
            "points off",
            "TTFT p50 off",
            "p90",
            "TPOT p50 off",
            "p90",
        ]
        _table(lines, titles, 1)


def _print_soak(result: Result) -> None:
    from headrace.bench.soak import verdict

    lines = [
        [f"{r['at_s'] / 60:.1f}", str(r["requests"]), str(r["finished"]), f"{r.get('tpot_ms_p50', 0):.2f}",
         f"{r.get('tpot_ms_p99', 0):.2f}", f"{r.get('ttft_ms_p50', 0):.1f}", f"{r.get('rest_slots_used', 0):.0f}"]
        for r in result.rows if r["kind"] == "round"
    ]  # fmt: skip
    _table(lines, ["minute", "requests", "finished", "TPOT p50 ms", "p99", "TTFT p50 ms", "slots held at rest"], 0)
    if not result.claims:
        typer.echo("no verdict: it ended before its first round did")
        return
    wrong = [name.replace("_", " in ", 1) for name, value in verdict(result.rows).items() if value]
    typer.echo("verdict: " + (", ".join(wrong) if wrong else "no leak, no drift"))
