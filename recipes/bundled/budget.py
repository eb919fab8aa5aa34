"""What a stretch of training may spend, and how a run is cut into stages and saved.

Progress is a fraction of the budget. It is either measured on the wall clock (a deadline holds however busy the
machine is) or in steps (a run is repeatable bit for bit). Time spent before an interruption counts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

MAX_MINUTES = 150.0


class Budget:
    """Progress through `minutes` of wall-clock time, or through `steps` when they are given."""

    def __init__(
        self, minutes: float, steps: int | None = None, spent: float = 0.0, clock: Callable[[], float] = time.time
    ) -> None:
        if not 0.0 < minutes <= MAX_MINUTES:
            raise ValueError(f"a stretch is at most {MAX_MINUTES:g} minutes, got {minutes:g}")
        self.seconds, self.steps, self.clock = minutes * 60.0, steps, clock
        self.began = clock() - spent

    def spent(self) -> float:
        """Seconds since the run began, interruptions left out."""
        return self.clock() - self.began

    def progress(self, step: int) -> float:
        """Share of the budget used before `step`, 1.0 when it is spent."""
        used = step / self.steps if self.steps is not None else self.spent() / self.seconds
        return min(1.0, used)

    def seconds_left(self, step: int) -> float:
        """Seconds until the end at the pace so far."""
        done = self.progress(step)
        return self.seconds - self.spent() if self.steps is None else self.spent() * (1.0 - done) / max(done, 1e-9)


@dataclass(frozen=True)
class Stage:
    """From `begin` (a share of the budget) on: rows of `length` tokens, `tokens` a step, drawn from `mix`."""

    begin: float
    length: int
    tokens: int
    mix: str

    @property
    def rows(self) -> int:
        """Rows of one optimiser step."""
        return max(1, self.tokens // self.length)


def stage_at(stages: list[Stage], progress: float) -> Stage:
    """The stage in force at `progress`."""
    return [stage for stage in stages if stage.begin <= progress][-1]


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write and rename, so that an interruption leaves the previous checkpoint whole."""
    partial = path.with_suffix(".partial")
    torch.save(content, partial)
    os.replace(partial, path)


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """The checkpoint, or None when there is none."""
    if not path.exists():
        return None
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=False)
    return content
