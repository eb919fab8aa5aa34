"""Profiles of a real engine: its steps timed on a grid, under a key that says what they depend on."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

from headrace.core.batch import Packer
from headrace.core.request import SamplingParams
from headrace.engine.engine import Engine
from headrace.engine.sampling import Draw
from headrace.native import build
from headrace.profiling.measure import timings
from headrace.profiling.profile import MeasuredProfile, Point
from headrace.profiling.shapes import EvenStep, grid, held_out
from headrace.profiling.store import ProfileKey
from headrace.version import __version__

Report = Callable[[int, int], None]


def step_timer(engine: Engine) -> Callable[[EvenStep], float]:
    """A function that packs, runs and samples a step on the engine's runner and returns its milliseconds.

    It writes to the engine's slots from the first one on without taking them, so the engine must be idle and forgets nothing
    only if its prefix cache is empty: profile before serving.
    """
    packer = Packer()
    greedy = SamplingParams(temperature=0.0, ignore_eos=True)

    def run(step: EvenStep) -> float:
        segments = step.segments(engine.card.vocab_size)
        draws = [Draw(row=row, params=greedy, seed=0, index=0) for row in range(len(segments))]
        started = time.perf_counter()
        engine.sampler.sample(engine.runner.run(packer.pack(segments)), draws)
        return (time.perf_counter() - started) * 1e3

    return run


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
        step_timer(engine),
        [*steps, *held_out(**bounds, count=unseen)],
        repeats=repeats,
        max_seconds=max_seconds,
        report=report,
    )
    return MeasuredProfile(points[: len(steps)]), points[len(steps) :]


def measure_unseen(
    engine: Engine, *, count: int = 24, repeats: int = 5, report: Report = lambda done, total: None
) -> list[Point]:
    """Time steps between the grid's, to hold a stored profile's predictions against."""
    return timings(step_timer(engine), held_out(**_bounds(engine), count=count), repeats=repeats, report=report)


def profile_key(engine: Engine, linears: str) -> ProfileKey:
    """What the costs of this engine's steps depend on.

    Args:
        linears: as the engine was configured: "auto", "module" or "native".
    """
    card = engine.card
    if linears == "auto":
        packed = card.dtype == "float32" and not torch.cuda.is_available() and build.available()
        linears = "native" if packed else "module"
    digest = hashlib.sha256(f"{card.parameters} {card.vocab_size}".encode())
    config = Path(card.path) / "config.json" if card.path else None
    if config is not None and config.is_file():
        digest.update(config.read_bytes())
    versions = {"headrace": __version__, "torch": torch.__version__, "python": platform.python_version()}
    return ProfileKey(
        model=digest.hexdigest()[:16],
        device=_device(),
        dtype=card.dtype,
        attention=str(getattr(engine.runner, "attention", "unknown")),
        linears=linears,
        versions=versions,
    )


def _bounds(engine: Engine) -> dict[str, int]:
    limits = engine.limits
    return {
        "max_sequences": limits.max_sequences,
        "max_step_tokens": limits.max_step_tokens,
        "context": engine.card.context,
        "slots": engine.space.pool.size,
    }


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
