"""``headrace bench simulate``: policies on a trace, on simulated hardware."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headrace.core.errors import InvalidRequest

if TYPE_CHECKING:
    from headrace.bench.results import Result
    from headrace.bench.workloads.arrivals import Arrival
    from headrace.core.protocols import Profile
    from headrace.core.request import SLO


def _workload(text: str, *names: str, **bounds: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel="Workload", **bounds)


def _machine(text: str, *names: str, **bounds: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel="Machine", **bounds)


Trace = Annotated[
    Path | None,
    _workload(
        "Azure or Mooncake trace, or JSON lines {emission_time_ms, prompt | input_length, output_length, slo}; "
        "without one, arrivals are drawn."
    ),
]
Rates = Annotated[
    list[float] | None, _workload("Requests per second; may be repeated. The trace's own by default.", "--rate")
]
Requests = Annotated[int, _workload("Requests to replay, from the start.", min=1)]
Hours = Annotated[
    float | None,
    _workload("Repeat the trace end to end for so many hours; the result then has a row per hour.", min=0.01),
]
Prompt = Annotated[int, _workload("Prompt tokens, without a trace.", min=1)]
Output = Annotated[int, _workload("Output tokens, without a trace.", min=1)]
TtftTarget = Annotated[float | None, _workload("TTFT target of requests without one.")]
TpotTarget = Annotated[float | None, _workload("TPOT target of requests without one.")]

Policies = Annotated[
    list[str] | None,
    typer.Option("--policy", help="A policy; may be repeated. chunked and prefill-first by default."),
]
MachineName = Annotated[str, _machine("linear, llama-3.1-70b-8xa100 or qwen2.5-32b-4xa100.", metavar="NAME")]
ProfileFile = Annotated[Path | None, _machine("A profile written by headrace profile, instead of --machine.")]
MaxSequences = Annotated[int, _machine("Sequences running at once.", min=1)]
MaxStepTokens = Annotated[int, _machine("Tokens in one step.", min=1)]
Slots = Annotated[int, _machine("Tokens whose K and V fit the memory.", min=2)]
Context = Annotated[int, _machine("Longest prompt plus output; more is cut.", min=2)]
PrefixCache = Annotated[bool, _machine("Share the K and V of equal prefixes.", "--prefix-cache/--no-prefix-cache")]

Seed = Annotated[int, typer.Option(help="Seed of arrivals and tokens.")]
JsonPath = Annotated[
    Path | None, typer.Option("--json", help="Where to write the result; results/simulate.json by default.")
]
Plot = Annotated[Path | None, typer.Option(help="Write curves over the rate to this PNG.")]
Quick = Annotated[bool, typer.Option("--quick", help="Within 90 seconds: at most 200 requests.")]


def simulate(
    trace: Trace = None,
    rate: Rates = None,
    requests: Requests = 1000,
    hours: Hours = None,
    prompt: Prompt = 512,
    output: Output = 128,
    slo_ttft_ms: TtftTarget = None,
    slo_tpot_ms: TpotTarget = None,
    policy: Policies = None,
    machine: MachineName = "llama-3.1-70b-8xa100",
    profile: ProfileFile = None,
    max_sequences: MaxSequences = 64,
    max_step_tokens: MaxStepTokens = 512,
    slots: Slots = 1 << 18,
    context: Context = 1 << 14,
    prefix_cache: PrefixCache = False,
    seed: Seed = 0,
    json_path: JsonPath = None,
    plot: Plot = None,
    quick: Quick = False,
) -> None:
    """Compare policies on a trace in simulated time: the real engine and policies, a modelled machine."""
    from rich.console import Console

    from headrace.bench import simulate as bench
    from headrace.bench.plots import need_matplotlib, write_curves
    from headrace.bench.workloads.arrivals import repeated, truncated
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
        by_hour=hours is not None,
    )
    costs = _profile(profile, machine)
    slo = SLO(slo_ttft_ms, slo_tpot_ms)
    count = min(requests, 200) if quick else requests
    arrivals = _arrivals(trace, costs, slo, prompt, output, (rate or [1.0])[0], seed, count)
    arrivals = truncated(arrivals, count=count) if hours is None else repeated(arrivals, hours * 3600)
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
    from headrace.bench.simulation.machines import get_machine
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
    trace: Path | None, costs: Profile, slo: SLO, prompt: int, output: int, rate: float, seed: int, count: int
) -> list[Arrival]:
    from headrace.bench.workloads.arrivals import poisson
    from headrace.bench.workloads.traces import load_trace
    from headrace.core.batch import StepShape

    if trace is None:
        return poisson(rate, count, seed=seed, lengths=[(prompt, output)], slo=slo)
    lone = costs.cost(StepShape(0, 1, 512, 1, 513))
    return load_trace(trace, baseline_tpot_ms=lone, rate=rate, seed=seed, slo=slo)


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
    shown = [(policy, rate, metrics.summary(rows)) for (policy, rate), rows in cases(result.rows).items()]
    shown += [(f"{r['policy']}, hour {r['hour']}", r["rate"], r) for r in result.rows if r["kind"] == "hour"]
    for policy, rate, f in shown:
        table.add_row(
            policy, f"{rate:.3g}", f"{f['attainment']:.1%}", f"{f['goodput_tok_s']:.0f}", f"{f['throughput_tok_s']:.0f}",
            f"{f['ttft_ms_p50']:.0f}", f"{f['ttft_ms_p99']:.0f}", f"{f['tpot_ms_p50']:.1f}", f"{f['tpot_ms_p99']:.1f}",
            f"{f['preemptions']:.0f}",
        )  # fmt: skip
    # A pipe has no width of its own, and cut figures are of no use.
    Console(width=max(Console().width, 110)).print(table)
