"""``headrace bench``: measurements that compare systems in one run, and a check of stored results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from headrace.cli import serve_bench
from headrace.cli.adaserve import adaserve
from headrace.cli.make_model import make_model
from headrace.cli.peers import peers
from headrace.cli.pqcache import pqcache
from headrace.cli.simulate import simulate

bench = typer.Typer(
    help="Measure headrace against other systems on this machine.", no_args_is_help=True, context_settings={}
)

bench.command()(simulate)
bench.command()(adaserve)
bench.command()(pqcache)
bench.command("make-model")(make_model)
bench.command()(serve_bench.serve)
bench.command()(serve_bench.soak)
bench.add_typer(peers, name="peers")

JsonPath = Annotated[
    Path | None, typer.Option("--json", help="Where to write the result; results/NAME.json by default.")
]


@bench.command()
def engine(
    shape: Annotated[str, typer.Option(help="Model shape, with random weights: 125m or 20m.")] = "125m",
    repeats: Annotated[int, typer.Option(min=1, help="Measured turns of every system.")] = 5,
    new: Annotated[int, typer.Option(min=2, help="Tokens generated per request.")] = 64,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all by default.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights and prompts.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Within 90 seconds: fewer turns, shorter answers.")] = False,
    json_path: JsonPath = None,
) -> None:
    """Decode speed and the engine's own share of a step, against transformers' generate and continuous batching."""
    from rich.console import Console

    from headrace.bench import engine as engine_bench

    console = Console(stderr=True)
    setting = engine_bench.EngineBench(
        shape=shape, repeats=2 if quick else repeats, new=16 if quick else new, threads=threads, seed=seed
    )
    with console.status("loading three copies of the model") as status:
        result = engine_bench.run(setting, report=status.update)
    path = json_path or Path("results/engine.json")
    result.write(path)
    _print_rates(result.rows)
    console.print(f"written to {path}", style="dim")
    print(json.dumps(result.claims))


@bench.command()
def gpu(
    shape: Annotated[str, typer.Option(help="Model shape, with random weights: 125m, 0.5b, 1b or 8b.")] = "1b",
    repeats: Annotated[int, typer.Option(min=1, help="Measured turns of everything.")] = 5,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer turns, shorter answers.")] = False,
    json_path: JsonPath = None,
) -> None:
    """The GPU path: attention against SDPA and the memory, captured steps against launched ones, decoding against transformers."""
    from rich.console import Console

    from headrace.bench import gpu as gpu_bench

    console = Console(stderr=True)
    setting = gpu_bench.GpuBench(shape=shape, repeats=2 if quick else repeats, new=32 if quick else 128)
    with console.status("measuring the memory") as status:
        result = gpu_bench.run(setting, report=status.update)
    path = json_path or Path("results/gpu.json")
    result.write(path)
    console.print(f"written to {path}", style="dim")
    print(json.dumps(result.claims))


@bench.command()
def quality(
    model: Annotated[str, typer.Argument(help="Folder, hub name, or bundled.")] = "bundled",
    text: Annotated[
        list[Path] | None, typer.Option(help="Held-out text (.xz and .gz too); may be given again.")
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows taken of each text.")] = 8,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 512,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all by default.")] = None,
    json_path: JsonPath = None,
) -> None:
    """What int8 and nf4 weights and int8 K and V cost in likelihood, on text."""
    from rich.console import Console

    from headrace.bench import quality as quality_bench

    console = Console(stderr=True)
    setting = quality_bench.QualityBench(model, tuple(text or ()), windows, length, threads)
    with console.status("loading") as status:
        result = quality_bench.run(setting, report=status.update)
    path = json_path or Path("results/quality.json")
    result.write(path)
    _print_quality(result.rows)
    console.print(f"written to {path}", style="dim")
    print(json.dumps(result.claims))


@bench.command()
def check(file: Annotated[Path, typer.Argument(help="A result file.")]) -> None:
    """Compute the claims of a result file again from its rows; exit status 2 when they differ."""
    from headrace.bench import engine, gpu, make_model, quality, serve, simulate, soak
    from headrace.bench.adaserve import run as adaserve_run
    from headrace.bench.pqcache import claims as pqcache
    from headrace.bench.results import recheck
    from headrace.core.errors import InvalidRequest

    different = recheck(
        file,
        {
            "adaserve": adaserve_run.claims,
            "engine": engine.claims,
            "gpu": gpu.claims,
            "simulate": simulate.claims,
            "make-model": make_model.claims,
            "pqcache": pqcache.claims,
            "quality": quality.claims,
            "serve": serve.claims,
            "soak": soak.claims,
        },
    )
    if different:
        lines = [f"{name}: stated {old}, the rows give {new}" for name, (old, new) in sorted(different.items())]
        raise InvalidRequest(f"{file}: claims do not follow from the rows: " + "; ".join(lines), field="file")
    print(f"{file}: every claim follows from the rows")


def _print_quality(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    from headrace.bench.quality import spread

    table = Table(box=None, pad_edge=False)
    for title in ("text", "form"):
        table.add_column(title)
    for title in ("tokens", "nats a token", "more", "+-", "same greedy"):
        table.add_column(title, justify="right")
    for text, form in dict.fromkeys((row["text"], row["form"]) for row in rows):
        mine = [row for row in rows if (row["text"], row["form"]) == (text, form)]
        tokens = sum(row["tokens"] for row in mine)
        nll, plain, same = (
            sum(row[name] * row["tokens"] for row in mine) / tokens for name in ("nll", "nll_plain", "same_greedy")
        )
        table.add_row(
            text, form, str(tokens), f"{nll:.4f}", f"{nll - plain:+.5f}", f"{spread(mine):.5f}", f"{same:.2%}"
        )  # fmt: skip
    Console().print(table)


def _print_rates(rows: list[dict[str, object]]) -> None:
    import statistics

    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("batch", "system"):
        table.add_column(title)
    for title in ("decode tok/s", "range", "first token ms", "outside forward"):
        table.add_column(title, justify="right")
    for batch, system in dict.fromkeys((r["batch"], r["system"]) for r in rows):
        mine = [r for r in rows if (r["batch"], r["system"]) == (batch, system)]
        rates = sorted(float(str(r["decode_tok_s"])) for r in mine)
        first = statistics.median(float(str(r["first_token_ms"])) for r in mine)
        shares = [float(str(r["outside_forward_share"])) for r in mine if "outside_forward_share" in r]
        share = f"{statistics.median(shares):.1%}" if shares else ""
        table.add_row(
            str(batch), str(system), f"{statistics.median(rates):.1f}", f"{rates[0]:.1f} to {rates[-1]:.1f}", f"{first:.0f}", share
        )  # fmt: skip
    Console().print(table)
