"""``headrace bench pqcache``: decode steps that read a tenth of the context, their speed and what they lose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def pqcache(
    part: Annotated[str, typer.Option(help="all, speed or quality.")] = "all",
    quick: Annotated[bool, typer.Option("--quick", help="Within 90 seconds: fewer lengths and repeats.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all by default.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the speed half into this PNG.")] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Where to write the result; results/pqcache.json by default.")
    ] = None,
) -> None:
    """Attention through product-quantised keys: time against dense attention, memory, and quality against other selections."""
    from rich.console import Console

    from headrace.bench.pqcache import run as bench
    from headrace.core.errors import InvalidRequest

    if part not in bench.PARTS:
        raise InvalidRequest(f"part is {part!r}: choose one of {', '.join(bench.PARTS)}", field="part")
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    path = json_path or Path("results/pqcache.json")
    kept = [] if part == "all" else _other(path, part)
    console = Console(stderr=True)
    with console.status("measuring") as status:
        result = bench.run(part, quick=quick, progress=status.update, kept=kept)
    result.write(path)
    if plot is not None:
        bench.draw([row for row in result.rows if row["part"] == "speed"], plot)
    console.print(f"written to {path}", style="dim")
    print(json.dumps(result.claims))


def _other(path: Path, part: str) -> list[dict[str, Any]]:
    """Rows of the other half in the file that is about to be replaced."""
    try:
        rows = json.loads(path.read_text())["rows"]
        return [row for row in rows if row["part"] != part]
    except (OSError, ValueError, KeyError, TypeError):
        return []
