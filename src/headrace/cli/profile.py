"""``headrace profile``: what the steps of a model cost on this machine."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headrace.cli import options

if TYPE_CHECKING:
    from headrace.core.config import EngineConfig
    from headrace.engine.engine import Engine
    from headrace.profiling.profile import MeasuredProfile, Point

UNSEEN = 24


def profile(
    model: Annotated[str, typer.Argument(help="A folder, a hub name, or bundled.")] = "bundled",
    plot: Annotated[Path | None, typer.Option(help="Draw the curves to this PNG.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON, for machines.")] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Timings of every step.")] = 5,
    max_seconds: Annotated[float, typer.Option(min=0, help="Begin no further round after this long.")] = 120.0,
    again: Annotated[bool, typer.Option("--again", help="Measure even if a stored profile fits.")] = False,
    dtype: options.DType = "auto",
    device: options.Device = "auto",
    attention: options.Attention = "auto",
    linears: options.Linears = "auto",
    quantize: options.Quantize = None,
    max_sequences: options.MaxSequences = 64,
    max_step_tokens: options.MaxStepTokens = 512,
    kv_gib: options.KvGib = None,
    kv_cache_dtype: options.KvCacheDtype = "auto",
    max_context: options.MaxContext = None,
    threads: options.Threads = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Measure what steps cost, keep it for later, and show how well unseen steps are predicted."""
    from rich.console import Console

    from headrace.bench.plots import need_matplotlib
    from headrace.compose import build_engine
    from headrace.core.config import EngineConfig
    from headrace.engine.profiled import profile_key
    from headrace.profiling.store import path_of

    if plot is not None:
        need_matplotlib()  # a missing package shall not cost a measurement
    console = Console(stderr=True)
    config = EngineConfig.from_options(
        model=model, dtype=dtype, device=device, attention=attention, linears=linears, kv_gib=kv_gib, quantize=quantize,
        kv_cache_dtype=kv_cache_dtype, max_context=max_context, threads=threads, trust_remote_code=trust_remote_code,
        max_sequences=max_sequences, max_step_tokens=max_step_tokens, profile="off",
    )  # fmt: skip
    engine = build_engine(config, progress=not as_json)
    measured, unseen = _measured(engine, config, repeats=repeats, max_seconds=max_seconds, again=again, console=console)
    errors = measured.errors(unseen)
    if plot is not None:
        _plot(plot, measured, unseen)
    if as_json:
        print(json.dumps({"file": str(path_of(profile_key(engine, config))), **_as_dict(measured, unseen, errors)}))
        return
    _print(measured, unseen, errors)
    console.print(f"kept in {path_of(profile_key(engine, config))}", style="dim")


def _measured(
    engine: Engine, config: EngineConfig, *, repeats: int, max_seconds: float, again: bool, console: Any
) -> tuple[MeasuredProfile, list[Point]]:
    from rich.progress import Progress

    from headrace.engine.profiled import measure_engine, measure_unseen, profile_key
    from headrace.profiling.store import load_or_measure

    unseen: list[Point] = []
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("timing steps")

        def report(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        def measure() -> MeasuredProfile:
            fresh, points = measure_engine(
                engine, unseen=UNSEEN, repeats=repeats, max_seconds=max_seconds, report=report
            )
            unseen.extend(points)
            return fresh

        found = load_or_measure(profile_key(engine, config), measure, again=again)
        if not unseen:  # it was stored: see how it fares on the machine as it is now
            unseen = measure_unseen(engine, count=UNSEEN, repeats=repeats, report=report)
    return found, unseen


def _as_dict(measured: MeasuredProfile, unseen: Sequence[Point], errors: Sequence[float]) -> dict[str, Any]:
    return {
        "points": [_row(measured, p) for p in measured.points],
        "held_out": [_row(measured, p) for p in unseen],
        "profile_error_p50": statistics.median(errors) if errors else None,
    }


def _row(measured: MeasuredProfile, point: Point) -> dict[str, Any]:
    return {**asdict(point.shape), "measured_ms": point.p50, "predicted_ms": measured.cost(point.shape)}


def _print(measured: MeasuredProfile, unseen: Sequence[Point], errors: Sequence[float]) -> None:
    from rich.console import Console
    from rich.table import Table

    for title, points in (("Measured", measured.points), ("Held out", unseen)):
        table = Table(title=title, box=None, pad_edge=False, title_justify="left")
        for name in ("prompt tokens", "decodes", "context", "measured ms", "predicted ms", "error"):
            table.add_column(name, justify="right")
        for p in points:
            cost = measured.cost(p.shape)
            table.add_row(
                str(p.shape.prefill_tokens), str(p.shape.decode_tokens), str(p.shape.context), f"{p.p50:.2f}", f"{cost:.2f}",
                f"{cost / p.p50 - 1:+.0%}",
            )  # fmt: skip
        Console().print(table)
    if errors:
        worst = sorted(errors)[int(0.9 * (len(errors) - 1))]
        print(f"error on {len(errors)} unseen steps: p50 {statistics.median(errors):.1%}, p90 {worst:.1%}")


def _plot(path: Path, measured: MeasuredProfile, unseen: Sequence[Point]) -> None:
    """Decode steps by sequences, prompts by tokens, and predicted against measured for everything unseen."""
    from headrace.bench.plots import Series, write_curves

    decodes: dict[str, list[tuple[float, float]]] = {}
    prompts: dict[str, list[tuple[float, float]]] = {"measured": [], "predicted": []}
    for p in measured.points:
        shape = p.shape
        if not shape.prefill_tokens:
            each = shape.context // max(shape.decode_tokens, 1)
            decodes.setdefault(f"context {each}", []).append((shape.decode_tokens, p.p50))
            decodes.setdefault(f"predicted {each}", []).append((shape.decode_tokens, measured.cost(shape)))
        elif not shape.decode_tokens and not shape.context and shape.sequences == 1:
            prompts["measured"].append((shape.prefill_tokens, p.p50))
            prompts["predicted"].append((shape.prefill_tokens, measured.cost(shape)))
    pairs = sorted((p.p50, measured.cost(p.shape)) for p in unseen)
    panels: dict[str, Series] = {
        "decode step, ms": decodes,
        "one prompt, ms": prompts,
        "unseen: predicted ms over measured ms": {"predicted": pairs, "exact": [(ms, ms) for ms, _ in pairs]},
    }
    write_curves(path, panels, x_label="tokens in the step, or measured ms")
