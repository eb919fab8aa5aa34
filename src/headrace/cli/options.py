"""Options that several commands share, in the words of :class:`headrace.core.config.EngineConfig`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headrace.core.errors import InvalidRequest

ENGINE = "Engine"
SAMPLING = "Sampling"

DType = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.", rich_help_panel=ENGINE, metavar="NAME")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel=ENGINE, metavar="NAME")]
Attention = Annotated[
    str, typer.Option(help="auto, reference, numba or triton.", rich_help_panel=ENGINE, metavar="NAME")
]
Linears = Annotated[
    str,
    typer.Option(
        help="auto, module (the checkpoint's own) or native (compiled kernels).", rich_help_panel=ENGINE, metavar="NAME"
    ),
]
PolicyName = Annotated[
    str,
    typer.Option(
        "--policy",
        help="Who runs in a step: chunked, prefill-first, priority, mlfq or vtc.",
        rich_help_panel=ENGINE,
        metavar="NAME",
    ),
]
MaxSequences = Annotated[int, typer.Option(help="Sequences running at once.", rich_help_panel=ENGINE)]
MaxStepTokens = Annotated[int, typer.Option(help="Tokens in one step.", rich_help_panel=ENGINE)]
KvGib = Annotated[
    float | None,
    typer.Option(help="Memory for K and V in GiB; by default a share of what is free.", rich_help_panel=ENGINE),
]
MaxContext = Annotated[
    int | None,
    typer.Option(help="Longest prompt plus output in tokens; by default the model's own.", rich_help_panel=ENGINE),
]
PrefixCache = Annotated[
    bool,
    typer.Option(
        "--prefix-cache/--no-prefix-cache", help="Share the K and V of equal prefixes.", rich_help_panel=ENGINE
    ),
]
Threads = Annotated[int | None, typer.Option(help="CPU threads; all by default.", rich_help_panel=ENGINE)]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run Python code that comes with the checkpoint.", rich_help_panel=ENGINE),
]


def read_text(path: Path, option: str) -> str:
    """The text of a file named by ``option``; "-" is standard input.

    Raises:
        InvalidRequest: it cannot be read, or is not UTF-8.
    """
    import sys

    try:
        return sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InvalidRequest(f"{option} {path}: {reason}", field=option.lstrip("-")) from error
