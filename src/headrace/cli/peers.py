"""``headrace bench peers``: which other engines can be measured on this machine, and how to get the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

peers = typer.Typer(
    help="List the engines that headrace can be measured against, and install them.",
    invoke_without_command=True,
    context_settings={},
)

FOLDER_HELP = "Where peers live, each in a virtual environment of its own; $HEADRACE_PEERS by default."
Folder = Annotated[Path | None, typer.Option("--peers", help=FOLDER_HELP, metavar="FOLDER")]


@peers.callback()
def listed(context: typer.Context, folder: Folder = None) -> None:
    """List engines, versions and precisions; for those that are not here, the command that installs them."""
    if context.invoked_subcommand is not None:
        return
    from rich.console import Console
    from rich.table import Table

    from headrace.bench.peers import discover

    table = Table(box=None, pad_edge=False)
    for title in ("engine", "version", "precisions", "to install"):
        table.add_column(title, overflow="fold")
    for peer in discover(folder):
        remedy = "" if peer.installed else peer.remedy
        table.add_row(peer.name, peer.version or "-", " ".join(peer.precisions), remedy)
    Console().print(table)


@peers.command()
def install(
    names: Annotated[list[str], typer.Argument(help="Engines, as the list names them.", metavar="NAME...")],
    folder: Folder = None,
) -> None:
    """Create an engine's virtual environment and install it there with pip; llama.cpp is compiled, which takes minutes."""
    from headrace.bench.peers import discover
    from headrace.bench.peers import install as install_peer

    discover(folder, names)  # a wrong name shall not cost an installation
    for name in names:
        peer = install_peer(name, folder)
        print(f"{peer.name} {peer.version or 'was not found after its installation'}")
