"""Making a peer's virtual environment."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from headrace.bench.peers.catalog import Peer, discover, interpreter
from headrace.core.errors import InvalidRequest

Run = Callable[[list[str], dict[str, str]], int]


def _call(command: list[str], environment: dict[str, str]) -> int:
    return subprocess.call(command, env=environment)


def install(name: str, folder: Path | None = None, *, run: Run = _call) -> Peer:
    """Create ``FOLDER/<name>`` and install the peer there with pip; again, it updates.

    Args:
        name: of the peer.
        folder: as in :func:`headrace.bench.peers.discover`.
        run: runs a command in an environment and returns its exit status.

    Raises:
        InvalidRequest: an unknown name, or pip failed.
    """
    peer = discover(folder, [name])[0]
    if not peer.recipe.packages:
        return peer
    home = peer.folder / name
    python = str(interpreter(home))
    variables = {**os.environ, **dict(peer.recipe.variables)}
    commands = [[sys.executable, "-m", "venv", str(home)], [python, "-m", "pip", "install", *peer.recipe.packages]]
    if peer.recipe.unwanted:
        commands.append([python, "-m", "pip", "uninstall", "--yes", *peer.recipe.unwanted])
    for command in commands:
        status = run(command, variables)
        if status != 0:
            raise InvalidRequest(
                f"installing {name} failed with status {status}: {' '.join(command)}; mend that and run it again, or leave {name} out",
                field="peer",
            )
    return discover(folder, [name])[0]
