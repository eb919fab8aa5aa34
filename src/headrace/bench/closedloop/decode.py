"""The closed loop: engines take turns at the same batches of random prompts, ours among them, each in a process of its own.

A turn of an engine at a batch size: a short call that is not counted (its caches have gone cold while others ran), one token per
prompt, then ``new`` tokens per prompt, every call with fresh prompts so that no prefix is ever reused; memory's speed is probed
before and after. ``decode = batch * (new - 1) / (time of new tokens - time of 1 token)``; ``prefill = prompt tokens / time of 1
token``. All others are stopped meanwhile, so that no thread of theirs spins. An engine that fails loses its rows, and only those.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from headrace.bench import peers
from headrace.bench.closedloop.claims import claims, table
from headrace.bench.closedloop.inside import inside_rows
from headrace.bench.closedloop.memory import MemoryProbe
from headrace.bench.closedloop.testmodel import random_checkpoint
from headrace.compose import default_threads
from headrace.core.errors import HeadraceError, InvalidRequest

__all__ = ["Setting", "claims", "quick", "run", "table"]

Row = dict[str, Any]
Report = Callable[[str], None]
QUICK_PEERS = ("headrace", "transformers", "transformers-cb", "openvino")
AGREED_PROMPTS, AGREED_TOKENS = 4, 24


@dataclass(frozen=True, slots=True)
class Setting:
    """What to measure.

    Attributes:
        checkpoint: a folder; None makes a Llama of ``shape`` with random weights.
        shape: as in :func:`headrace.bench.closedloop.testmodel.random_checkpoint`.
        folder: the peers' folder; None takes the usual one.
        engines: names to measure; None takes all that are installed.
        precisions: classes of weights, of :data:`headrace.bench.peers.PRECISIONS`.
        batches: prompts at once.
        repeats: turns of every engine at every batch size.
        prompt, new: tokens per prompt and per answer.
        threads: of every engine; None takes all cores.
        seed: of weights and prompts.
        convert: whether to convert the checkpoint for peers that have not done so yet; if not they are left out.
        inside: whether to measure steps of our engine and the bundled pair as well.
        budget_s: seconds of the turns after which no engine is started and no further round begun.
        load_s: seconds any engine may take to load.
        brief: whether the steps and the pair are measured on less.
    """

    checkpoint: Path | None = None
    shape: str = "125m"
    folder: Path | None = None
    engines: tuple[str, ...] | None = None
    precisions: tuple[str, ...] = ("fp32", "int8")
    batches: tuple[int, ...] = (1, 8)
    repeats: int = 3
    prompt: int = 128
    new: int = 128
    threads: int | None = None
    seed: int = 0
    convert: bool = True
    inside: bool = True
    budget_s: float | None = None
    load_s: float = 300.0
    brief: bool = False

    def __post_init__(self) -> None:
        for name in ("repeats", "prompt"):
            if getattr(self, name) < 1:
                raise InvalidRequest(f"{name} is {getattr(self, name)}: give at least 1", field=name)
        if self.new < 2:
            raise InvalidRequest(f"new is {self.new}: a decode rate needs at least 2 tokens", field="new")
        unknown = [name for name in self.precisions if name not in peers.PRECISIONS]
        if unknown or not self.precisions:
            raise InvalidRequest(
                f"precisions are {list(self.precisions)}: choose of {', '.join(peers.PRECISIONS)}", field="precisions"
            )


@dataclass(slots=True)
class Entry:
    """An engine in the run; ``session`` is None once it is lost, ``warm`` are the batch sizes it has met."""

    peer: peers.Peer
    precision: str
    session: peers.Session | None
    warm: set[int] = field(default_factory=set)


def quick(setting: Setting) -> Setting:
    """The same in about half a minute: a smaller shape, shorter answers, few engines, and of them only what is ready to start."""
    engines = tuple(name for name in QUICK_PEERS if setting.engines is None or name in setting.engines)
    budget = setting.budget_s or 20.0
    return replace(setting, shape="20m", engines=engines, repeats=2, new=33, convert=False, budget_s=budget, brief=True)


def run(setting: Setting, *, rows: list[Row] | None = None, report: Report = lambda line: None) -> list[Row]:
    """Measure everything in turn.

    Args:
        rows: where rows go as soon as they are known, so that whoever interrupts the run keeps them; a new list by default.

    Returns:
        ``rows``, of the kinds ``decode``, ``agreement``, ``tree``, ``overhead``, ``kv``, ``drafts`` and, for what could not be
        measured, ``lost`` with the reason.

    Raises:
        InvalidRequest: an unknown engine or shape.
        BrokenCheckpoint: ``checkpoint`` is none.
    """
    wanted = peers.discover(setting.folder, setting.engines)
    checkpoint = setting.checkpoint or random_checkpoint(setting.shape, setting.seed)
    rows = [] if rows is None else rows
    if setting.inside:
        rows += inside_rows(checkpoint, setting.threads, quick=setting.brief, report=report)
    # What our engine is like inside is asked once and has its own limit: the budget is for the turns.
    deadline = float("inf") if setting.budget_s is None else time.monotonic() + setting.budget_s
    with contextlib.ExitStack() as stack:
        entries = _start_all(setting, wanted, checkpoint, deadline, rows, stack, report)
        turns = Turns(setting, _vocabulary(checkpoint), rows, report)
        for entry in entries:
            turns.agree(entry)
        for repeat in range(setting.repeats):
            if repeat and time.monotonic() > deadline:
                break
            for batch in setting.batches:
                # Another one begins each time, so that nobody always follows the same neighbour.
                for place in range(len(entries)):
                    turns.take(entries[(place + repeat) % len(entries)], batch, repeat)
    return rows


class Prompts:
    """Random prompts, new ones on every call."""

    def __init__(self, seed: int, length: int, vocabulary: int) -> None:
        self._random = random.Random(seed)
        self._length, self._vocabulary = length, vocabulary

    def __call__(self, count: int) -> list[list[int]]:
        """``count`` prompts; the first ids are left out because tokenizers keep special tokens there."""
        return [[self._random.randrange(5, self._vocabulary) for _ in range(self._length)] for _ in range(count)]

    def fixed(self, count: int) -> list[list[int]]:
        """The same ``count`` prompts on every call."""
        return Prompts(1, self._length, self._vocabulary)(count)


class Turns:
    """What engines do in turn; ``rows`` get what they reached."""

    def __init__(self, setting: Setting, vocabulary: int, rows: list[Row], report: Report) -> None:
        self._setting, self._rows, self._report = setting, rows, report
        self._prompts = Prompts(setting.seed, setting.prompt, vocabulary)
        self._memory_speed = MemoryProbe(setting.threads or default_threads())

    def agree(self, entry: Entry) -> None:
        """Keep what the engine says to fixed prompts, to be compared with the others."""
        with self._awake(entry) as session:
            tokens = session.generate(self._prompts.fixed(AGREED_PROMPTS), AGREED_TOKENS).tokens
            self._rows.append(
                {"kind": "agreement", "engine": entry.peer.name, "precision": entry.precision, "tokens": tokens}
            )

    def take(self, entry: Entry, batch: int, repeat: int) -> None:
        """One turn, unless the engine is lost."""
        if entry.session is None:
            return
        with self._awake(entry) as session:
            # What is compiled or grown on first use comes before the first turn.
            session.generate(self._prompts(batch), 1 if batch in entry.warm else self._setting.new)
            entry.warm.add(batch)
            row = self._measured(entry, session, batch, repeat)
            self._rows.append(row)
            who = f"{entry.peer.name} {entry.precision}"
            turn = f"{repeat + 1}/{self._setting.repeats}"
            self._report(f"{turn} · batch {batch} · {who}: {row['decode_tok_s']:.1f} tok/s")

    def _measured(self, entry: Entry, session: peers.Session, batch: int, repeat: int) -> Row:
        setting = self._setting
        before = self._memory_speed()
        one = session.generate(self._prompts(batch), 1).seconds
        many = session.generate(self._prompts(batch), setting.new).seconds
        after = self._memory_speed()
        return {
            "kind": "decode", "engine": entry.peer.name, "version": entry.peer.version, "precision": entry.precision,
            "ran": session.ran, "batch": batch, "repeat": repeat, "prompt": setting.prompt, "new": setting.new,
            "seconds_one": one, "seconds_all": many,
            "decode_tok_s": batch * (setting.new - 1) / max(many - one, 1e-9),
            "prefill_tok_s": batch * setting.prompt / one,
            "probe_before_gb_s": before, "probe_after_gb_s": after, "load": os.getloadavg()[0],
        }  # fmt: skip

    @contextlib.contextmanager
    def _awake(self, entry: Entry) -> Iterator[peers.Session]:
        """The entry's session, running; what fails inside costs the entry its place."""
        session = entry.session
        assert session is not None
        session.resume()
        try:
            yield session
        except peers.PeerFailed as error:
            self._rows.append(_lost(entry.peer, entry.precision, error))
            self._report(str(error))
            session.close()
            entry.session = None
        else:
            session.pause()


def _start_all(
    setting: Setting,
    wanted: list[peers.Peer],
    checkpoint: Path,
    deadline: float,
    rows: list[Row],
    stack: contextlib.ExitStack,
    report: Report,
) -> list[Entry]:
    """Every installed engine in every precision it has, loaded and stopped."""
    digest = peers.checkpoint_digest(checkpoint)
    entries: list[Entry] = []
    for precision in setting.precisions:
        for peer in (each for each in wanted if precision in each.precisions):
            report(f"starting {peer.name} {precision}")
            try:
                if peer.installed and not setting.convert and not peers.is_converted(peer, digest, precision):
                    raise peers.PeerFailed("the checkpoint is not converted for it yet: run once without --quick")
                if time.monotonic() > deadline:
                    raise peers.PeerFailed("no time left to start it")
                _need_memory(checkpoint)
                session = peers.start(
                    peer, checkpoint, precision, digest=digest, threads=setting.threads,
                    sequences=max(setting.batches), context=setting.prompt + setting.new,
                    load_s=setting.load_s, report=report,
                )  # fmt: skip
            except HeadraceError as error:
                rows.append(_lost(peer, precision, error))
                report(f"{peer.name} {precision}: {error}")
                continue
            stack.callback(session.close)
            session.pause()
            entries.append(Entry(peer, precision, session))
    return entries


def _need_memory(checkpoint: Path) -> None:
    """Leave an engine out rather than push all others into swap or the system into killing one."""
    import psutil

    wanted = 3 * sum(path.stat().st_size for path in checkpoint.glob("*.safetensors")) + (1 << 30)
    free = psutil.virtual_memory().available
    if free < wanted:
        raise peers.PeerFailed(f"{free / 2**30:.1f} GiB of memory are free and about {wanted / 2**30:.1f} are needed")


def _vocabulary(checkpoint: Path) -> int:
    return int(json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["vocab_size"])


def _lost(peer: peers.Peer, precision: str, error: Exception) -> Row:
    return {"kind": "lost", "engine": peer.name, "version": peer.version, "precision": precision, "why": str(error)}
