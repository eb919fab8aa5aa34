"""The command line: ``headrace serve``, ``chat``, ``generate``, ``models``, ``profile``, ``bench`` and ``version``.

Exit status: 0 done, 2 something about the input (one line says what and how to mend it), 130 interrupted,
1 a fault of headrace itself. Commands import what they need when they run, so that ``--help`` answers at once.
"""

from __future__ import annotations

import sys

import typer

from headrace.cli import bench, chat, generate, models, profile, serve, version
from headrace.core.errors import HeadraceError

app = typer.Typer(
    name="headrace",
    help="Serve large language models so that every request meets its own latency target.",
    epilog="Start here:  headrace serve   then, in another terminal,  headrace chat",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (serve.serve, chat.chat, generate.generate, models.models, profile.profile, version.version):
    app.command(no_args_is_help=False)(command)
app.add_typer(bench.bench, name="bench")


def main() -> None:
    """Entry point of the ``headrace`` program; always leaves by SystemExit."""
    try:
        app(prog_name="headrace")
    except HeadraceError as error:
        print(f"headrace: {error.message}", file=sys.stderr)
        sys.exit(2)
