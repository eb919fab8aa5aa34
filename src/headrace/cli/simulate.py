"""``headrace bench simulate``: policies on a trace, on simulated hardware."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headrace.core.errors import InvalidRequest

if TYPE_CHECKING:
    from headrace.bench.results import Result
    from headrace.bench.workload import Arrival
    from headrace.core.protocols import Profile
    from headrace.core.request import SLO

WORKLOAD, MACHINE = "Workload", "Machine"


def simulate(
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Azure or Mooncake trace, or JSON lines {emission_time_ms, prompt | input_length, output_length, slo}; "
            "without one, arrivals are drawn.",
            rich_help_panel=WORKLOAD,
        ),
    ] = None,
    rate: Annotated[
        list[float] | None,
        typer.Option(
            help="Requests per second; may be repeated. The trace's own by default.", rich_help_panel=WORKLOAD
        ),
    ] = None,
    requests: Annotated[
        int, typer.Option(min=1, help="Requests to replay, from the start.", rich_help_panel=WORKLOAD)
    ] = 1000,
    prompt: Annotated[int, typer.Option(min=1, help="Prompt tokens, without a trace.", rich_help_panel=WORKLOAD)] = 512,
    output: Annotated[int, typer.Option(min=1, help="Output tokens, without a trace.", rich_help_panel=WORKLOAD)] = 128,
    slo_ttft_ms: Annotated[
        float | None, typer.Option(help="TTFT target of requests without one.", rich_help_panel=WORKLOAD)
    ] = None,
    slo_tpot_ms: Annotated[
        float | None, typer.Option(help="TPOT target of requests without one.", rich_help_panel=WORKLOAD)
    ] = None,
    policy: Annotated[
        list[str] | None, typer.Option(help="A policy; may be repeated. chunked and prefill-first by default.")
    ] = None,
    machine: Annotated[
        str,
        typer.Option(
            help="linear, llama-3.1-70b-8xa100 or qwen2.5-32b-4xa100.", rich_help_panel=MACHINE, metavar="NAME"
        ),
    ] = "llama-3.1-70b-8xa100",
    profile: Annotated[
        Path | None,
        typer.Option(help="A profile written by headrace profile, instead of --machine.", rich_help_panel=MACHINE),
    ] = None,
    max_sequences: Annotated[int, typer.Option(min=1, help="Sequences running at once.", rich_help_panel=MACHINE)] = 64,
    max_step_tokens: Annotated[int, typer.Option(min=1, help="Tokens in one step.", rich_help_panel=MACHINE)] = 512,
    slots: Annotated[int, typer.Option(min=2, help="Tokens whose K and V fit the memory.", rich_help_panel=MACHINE)] = 1
    << 18,
    context: Annotated[
        int, typer.Option(min=2, help="Longest prompt plus output; more is cut.", rich_help_panel=MACHINE)
    ] = 1 << 14,
    prefix_cache: Annotated[
        bool,
        typer.Option(
            "--prefix-cache/--no-prefix-cache", help="Share the K and V of equal prefixes.", rich_help_panel=MACHINE
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of arrivals and tokens.")] = 0,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Where to write the result; results/simulate.json by default.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Write curves over the rate to this PNG.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Within 90 seconds: at most 200 requests.")] = False,
) -> None:
    """Compare policies on a trace in simulated time: the real engine and policies, a modelled machine."""
    from rich.console import Console

    from headrace.bench import simulate as bench
    from headrace.bench.plots import need_matplotlib, write_curves
    from headrace.core.policy import Limits
    from headrace.core.request import SLO

    if plot is not None:
        need_matplotlib()  # a missing package shall not cost a run
    console = Console(stderr=True)
    setting = bench.Simulation(
        policies=tuple(policy or ("chunked", "prefill-first")),
        rates=tuple(rate or ()),
        limits=Limits(max_sequences, max(max_step_tokens, max_sequences), max(2048, max_step_tokens)),
        slots=slots,
        context=context,
        prefix_cache=prefix_cache,
        seed=seed,
    )
    costs = _profile(profile, machine)
    slo = SLO(slo_ttft_ms, slo_tpot_ms)
    count = min(requests, 200) if quick else requests
    arrivals = _arrivals(trace, costs, slo, count, prompt, output, (rate or [1.0])[0], seed)
    with console.status("simulating") as status:
        result = bench.run(setting, arrivals, costs, report=status.update)
    path = json_path or Path("results/simulate.json")
    result.write(path)
    if plot is not None:
        write_curves(plot, bench.panels(result.rows), x_label="requests/s", title="simulated")
    _print(result)
    console.print(f"written to {path}", style="dim")
    print(json.dumps(result.claims))


def _profile(path: Path | None, machine: str) -> Profile:
    from headrace.bench.machines import get_machine
    from headrace.profiling import store

    if path is None:
        return get_machine(machine)
    try:
        return store.read(path)
    except (OSError, ValueError) as error:
        raise InvalidRequest(
            f"--profile {path}: {error}; measure one with headrace profile MODEL, which says where it is kept",
            field="profile",
        ) from error


def _arrivals(
    trace: Path | None, costs: Profile, slo: SLO, count: int, prompt: int, output: int, rate: float, seed: int
) -> list[Arrival]:
    from headrace.bench.traces import load_trace
    from headrace.bench.workload import poisson, truncated
    from headrace.core.batch import StepShape

    if trace is None:
        return poisson(rate, count, seed=seed, lengths=[(prompt, output)], slo=slo)
    lone = costs.cost(StepShape(0, 1, 512, 1, 513))
    return truncated(load_trace(trace, baseline_tpot_ms=lone, rate=rate, seed=seed, slo=slo), count=count)


def _print(result: Result) -> None:
    from rich.console import Console
    from rich.table import Table

    from headrace.bench import metrics
    from headrace.bench.simulate import cases

    table = Table(box=None, pad_edge=False)
    table.add_column("policy")
    titles = ("requests/s", "attained", "goodput", "tok/s", "TTFT p50", "p99 ms", "TPOT p50", "p99 ms", "preempted")
    for title in titles:
        table.add_column(title, justify="right")
    for (policy, rate), rows in cases(result.rows).items():
        f = metrics.summary(rows)
        table.add_row(
            policy, f"{rate:.3g}", f"{f['attainment']:.1%}", f"{f['goodput_tok_s']:.0f}", f"{f['throughput_tok_s']:.0f}",
            f"{f['ttft_ms_p50']:.0f}", f"{f['ttft_ms_p99']:.0f}", f"{f['tpot_ms_p50']:.1f}", f"{f['tpot_ms_p99']:.1f}",
            f"{f['preemptions']:.0f}",
        )  # fmt: skip
    shown = Console(width=max(Console().width, 110))  # a pipe has no width of its own, and cut figures are of no use
    shown.print(table)
