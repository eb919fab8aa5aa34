"""From a checkpoint to a running engine: conversion, kept by the checkpoint's hash, and loading."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from headrace.bench.peers.catalog import DRIVERS, Peer
from headrace.bench.peers.session import CONVERT_S, LOAD_S, Driver, PeerFailed, Session, start_driver
from headrace.bench.sampler import Sampler
from headrace.core.errors import BrokenCheckpoint

DONE = "complete"

NEWS_S = 10.0
"""How often it is said that an engine still loads; some take minutes."""


def checkpoint_digest(checkpoint: Path) -> str:
    """16 hexadecimal digits of everything in a checkpoint folder that an engine reads.

    Raises:
        BrokenCheckpoint: there is no configuration or no weights.
    """
    files = (
        sorted(path for path in checkpoint.iterdir() if path.suffix in (".json", ".safetensors"))
        if checkpoint.is_dir()
        else []
    )
    if not {"config.json"} <= {path.name for path in files} or not any(path.suffix == ".safetensors" for path in files):
        raise BrokenCheckpoint(
            f"{checkpoint} holds no config.json with safetensors: give a checkpoint folder", field="checkpoint"
        )
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()[:16]


def is_converted(peer: Peer, digest: str, precision: str) -> bool:
    """Whether the peer could load the checkpoint without converting it first."""
    return not peer.recipe.converts or (peer.converted(digest, precision) / DONE).exists()


def start(
    peer: Peer,
    checkpoint: Path,
    precision: str,
    *,
    digest: str | None = None,
    threads: int | None = None,
    sequences: int = 8,
    context: int = 512,
    load_s: float = LOAD_S,
    report: Callable[[str], None] = lambda line: None,
) -> Session:
    """Start a peer with a checkpoint loaded, converted before if need be.

    Args:
        peer: which engine.
        checkpoint: a folder as transformers writes it.
        precision: one of the peer's ``precisions``.
        digest: of the checkpoint, where it is known already.
        threads: CPU threads; all cores of this process by default.
        sequences, context: the most sequences at once, and the tokens of each.
        load_s: seconds it may take to load.
        report: hears what takes long.

    Raises:
        PeerFailed: it is not installed, does not know the precision, or failed; nothing of it is left running.
        BrokenCheckpoint: ``checkpoint`` is none.
    """
    digest = digest or checkpoint_digest(checkpoint)
    if not peer.installed:
        raise PeerFailed(f"{peer.name} is not installed: {peer.remedy}")
    if precision not in peer.precisions:
        raise PeerFailed(f"{peer.name} does not run {precision}: it runs {', '.join(peer.precisions)}")
    threads = threads or len(os.sched_getaffinity(0))
    model = checkpoint.absolute()
    if peer.recipe.converts:
        if not is_converted(peer, digest, precision):
            report(f"{peer.name}: converting to {precision}")
            _convert(peer, model, peer.converted(digest, precision), precision, threads)
        model = peer.converted(digest, precision)
    driver = _driver(peer, threads)
    begun = time.monotonic()

    def still_loading() -> None:
        report(f"{peer.name}: loading, {time.monotonic() - begun:.0f} s")

    try:
        with Sampler(still_loading, NEWS_S):
            loaded = driver.ask(
                "load", load_s, model=str(model), precision=precision, threads=threads, sequences=sequences,
                context=context,
            )  # fmt: skip
    except BaseException:  # an interrupted start must not leave it running either
        driver.close()
        raise
    return Session(driver, precision, loaded)


def _driver(peer: Peer, threads: int) -> Driver:
    script, *arguments = peer.recipe.driver
    return start_driver(peer.name, peer.python, DRIVERS / script, arguments, threads)


def _convert(peer: Peer, checkpoint: Path, out: Path, precision: str, threads: int) -> None:
    """Convert in a process of its own into a folder that becomes ``out`` only once it is whole."""
    part = out.with_name(f"{out.name}.part{os.getpid()}")
    part.mkdir(parents=True)
    try:
        with _driver(peer, threads) as driver:
            driver.ask("prepare", CONVERT_S, checkpoint=str(checkpoint), out=str(part), precision=precision)
        (part / DONE).touch()
        shutil.rmtree(out, ignore_errors=True)
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
