"""Peers around the fake driver, for tests."""

from __future__ import annotations

import os
from pathlib import Path

from headrace.bench.peers.catalog import DRIVERS, Peer, Recipe

FAKE = Path(__file__).with_name("fake_driver.py")


def fake_peer(
    folder: Path, behaviour: str = "well", name: str = "fake", *, converts: bool = False, version: str | None = "1.0"
) -> Peer:
    """A peer whose driver is the fake one, under this Python."""
    recipe = Recipe(name, name, (str(FAKE), behaviour, str(DRIVERS)), ("fp32", "int8"), converts=converts)
    return Peer(recipe, folder, version)


def checkpoint(folder: Path, weights: bytes = b"w") -> Path:
    """A folder that looks like a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
