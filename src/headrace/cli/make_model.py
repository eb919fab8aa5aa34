"""``headrace bench make-model``: checkpoints with a small model's text and a big model's cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def make_model(
    out: Annotated[Path, typer.Option(help="Folder to write, about two bytes a weight.")],
    like: Annotated[str, typer.Option(help="Size to cost: 20m, 125m, 0.3b, 0.5b, 1b or 8b.")] = "0.5b",
    model: Annotated[str, typer.Option(help="The Llama whose text it keeps.")] = "bundled",
    random: Annotated[bool, typer.Option("--random", help="Random weights instead, for speed alone.")] = False,
    dtype: Annotated[str, typer.Option(help="With --random: bfloat16 or float32 weights.")] = "bfloat16",
    verify: Annotated[
        int,
        typer.Option(
            help="Compare this many answers with the model's and step times with a random model's; 200 is thorough."
        ),
    ] = 0,
    seed: Annotated[int, typer.Option(help="Seed of random weights.")] = 0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Where --verify writes its result.")] = None,
) -> None:
    """Write a cost-padded checkpoint: the model's exact behaviour at the step cost of a bigger one.

    Padded width, heads, layers and vocabulary are computed with and change nothing, so drafts are accepted as often, and answers
    are as long, as the small model's are, while a step costs what the bigger one's costs.
    """
    from rich.console import Console

    from headrace.bench import make_model as maker
    from headrace.core.errors import InvalidRequest
    from headrace.models.checkpoints.hub import resolve

    if random and verify:
        raise InvalidRequest("--verify compares texts, and --random has none: leave one of them out", field="verify")
    if dtype not in ("bfloat16", "float32"):
        raise InvalidRequest(f"dtype is {dtype!r}: choose bfloat16 or float32", field="dtype")
    console = Console(stderr=True)
    with console.status(f"writing {out}") as status:
        if random:
            maker.write_random(out, like, resolve(model), dtype=dtype, seed=seed)
        else:
            maker.make(like, out, model=model, seed=seed)
        if verify:
            result = maker.verify(out, like, model=model, prompts=verify, report=status.update)
    console.print(f"written to {out}; serve it with: headrace serve {out}", style="dim")
    if verify:
        result.write(json_path or Path("results/make-model.json"))
        print(json.dumps(result.claims))
