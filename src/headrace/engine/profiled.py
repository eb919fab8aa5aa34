"""Profiles of a real engine: its steps timed on a grid, under a key that says what they depend on."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from headrace.core.config import EngineConfig
from headrace.core.policy import Limits, StepPlan, View
from headrace.core.request import Request, SamplingParams
from headrace.engine.engine import Engine
from headrace.engine.kv import KVSpace
from headrace.engine.sequence import Sequence
from headrace.native import build
from headrace.profiling import store
from headrace.profiling.measure import timings, timings_within
from headrace.profiling.profile import MeasuredProfile, Point
from headrace.profiling.shapes import EvenStep, grid, held_out, spread_out
from headrace.profiling.tracking import Tracker
from headrace.version import __version__

START_SECONDS = 3.0
"""How long measuring may hold up a start."""

_TOKENS = 3
"""Of an answer in a timed step: one from the step before, one from it, and one more, so that nobody ends in it."""

Report = Callable[[int, int], None]


class StepTimer:
    """Times whole steps of an engine, from planning to committing, by running them in an engine of its own on the same runner.

    The engine must be idle. Steps take free slots and give them back; what these held stays nowhere else.

    Args:
        engine: whose runner, pool and sampler are used.
    """

    def __init__(self, engine: Engine) -> None:
        self._space = _Pretended(engine.space.pool)
        # Steps of a grid keep to the limits already; those of a warm step must not be split.
        limits = Limits(max_sequences=1 << 30, max_step_tokens=1 << 30, max_prefill_tokens=1 << 30)
        self._engine = Engine(engine.runner, self._space, _Everybody(), engine.sampler, engine.card, limits=limits)
        drawn = np.random.default_rng(0).integers(0, engine.card.vocab_size, engine.card.context, np.int32)
        self._tokens: list[int] = drawn.tolist()
        self._numbers = 0

    def __call__(self, step: EvenStep) -> float:
        """Milliseconds of ``step``: prompts are admitted in it, those who decode have been before."""
        engine = self._engine
        try:
            if step.decodes:
                self._add(step.decodes, max(0, step.decode_context - 1), 1)
                engine.step()
            if step.prompts:
                self._add(step.prompts, step.prompt_context, step.chunk)
            started = time.perf_counter()
            engine.step()
            return (time.perf_counter() - started) * 1e3
        finally:
            engine.abort_all()
            engine.step()  # hands out the aborts

    def _add(self, count: int, found: int, new: int) -> None:
        """``count`` requests of which ``found`` tokens are in slots already and ``new`` are to compute."""
        prompt = tuple(self._tokens[: found + new])
        params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=_TOKENS, seed=0)
        self._space.found = found
        for _ in range(count):
            self._numbers += 1
            name = str(self._numbers)
            self._engine.add(Request(name, prompt, params))


class _Pretended(KVSpace):
    """A slot pool in which sequences find as much of their prompt as they are told, whatever the slots hold."""

    found = 0

    def __init__(self, pool: object) -> None:
        super().__init__(pool, prefix_cache=False)  # type: ignore[arg-type]

    def attach(self, sequence: Sequence) -> int:
        slots = self.pool.take(self.found)
        sequence.hold(slots)
        sequence.context = len(slots)
        return len(slots)


class _Everybody:
    """Admits whoever waits, and computes all that is pending."""

    def admit(self, view: View) -> list[int]:
        return [s.id for s in view.waiting]

    def plan(self, view: View) -> StepPlan:
        return StepPlan(chunks=[(s.id, s.pending) for s in view.running])


def measure_engine(
    engine: Engine,
    *,
    unseen: int = 0,
    repeats: int = 5,
    max_seconds: float | None = None,
    report: Report = lambda done, total: None,
) -> tuple[MeasuredProfile, list[Point]]:
    """Time the grid's steps and fit a profile; see :func:`headrace.profiling.measure.timings`.

    Args:
        unseen: how many further steps to time in the same rounds, to hold predictions against.

    Returns:
        The profile of the grid's steps alone, and the unseen steps.
    """
    bounds = _bounds(engine)
    steps = grid(**bounds)
    points = timings(
        StepTimer(engine),
        [*steps, *held_out(**bounds, count=unseen)],
        repeats=repeats,
        max_seconds=max_seconds,
        report=report,
    )
    return MeasuredProfile(points[: len(steps)]), points[len(steps) :]


def measure_quickly(engine: Engine, seconds: float = START_SECONDS) -> MeasuredProfile:
    """As much of the grid as ``seconds`` allow, the most telling steps first."""
    return MeasuredProfile(timings_within(StepTimer(engine), spread_out(grid(**_bounds(engine))), seconds))


def measure_unseen(
    engine: Engine, *, count: int = 24, repeats: int = 5, report: Report = lambda done, total: None
) -> list[Point]:
    """Time steps between the grid's, to hold a stored profile's predictions against."""
    return timings(StepTimer(engine), held_out(**_bounds(engine), count=count), repeats=repeats, report=report)


def attach_profile(engine: Engine, config: EngineConfig) -> None:
    """Give an idle engine its profile: the stored one that fits, else one measured now, within :data:`START_SECONDS`.

    From then on policies can ask it, every step corrects it, and closing the engine writes it back. ``config.profile`` says which:
    "auto"; "measure" measures whatever is stored; "off"; or the file to keep it in.
    """
    if config.profile == "off":
        return
    if not grid(**_bounds(engine)):
        return  # a context or a pool of a few tokens: nothing worth predicting
    key = profile_key(engine, config)
    path = None if config.profile in ("auto", "measure") else Path(config.profile)
    again = config.profile == "measure"
    found = store.load_or_measure(key, partial(measure_quickly, engine), path=path, again=again)
    engine.profile = found
    engine.observer = Tracker(found, partial(store.keep, key=key, path=path))


def profile_key(engine: Engine, config: EngineConfig) -> store.ProfileKey:
    """What the costs of the steps of this engine, built from ``config``, depend on."""
    card, linears = engine.card, config.linears
    if linears == "auto":
        packed = card.dtype == "float32" and not torch.cuda.is_available() and build.available()
        linears = "native" if packed else "module"
    digest = hashlib.sha256(f"{card.parameters} {card.vocab_size}".encode())
    described = Path(card.path) / "config.json" if card.path else None
    if described is not None and described.is_file():
        digest.update(described.read_bytes())
    versions = {"headrace": __version__, "torch": torch.__version__, "python": platform.python_version()}
    return store.ProfileKey(
        model=digest.hexdigest()[:16],
        device=_device(),
        dtype=card.dtype,
        attention=str(getattr(engine.runner, "attention", "unknown")),
        linears=linears,
        kv_dtype=str(getattr(config, "kv_cache_dtype", "auto")),
        quantize=str(getattr(config, "quantize", None) or "none"),
        tp=int(getattr(config, "tp", 1)),
        versions=versions,
    )


def _bounds(engine: Engine) -> dict[str, int]:
    """Of the steps to time: each sequence needs room for the tokens of :data:`_TOKENS` steps."""
    limits = engine.limits
    return {
        "max_sequences": limits.max_sequences,
        "max_step_tokens": limits.max_step_tokens,
        "context": engine.card.context - _TOKENS,
        "slots": engine.space.pool.free - _TOKENS * limits.max_sequences,
    }


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
