"""The training loop both models share: stages, accumulation, progress, checkpoints that resume exactly."""

from __future__ import annotations

import argparse
import os
import sys
import time
import tomllib
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .budget import Budget, Stage, load_checkpoint, save_checkpoint, stage_at
from .data import Reader
from .loss import LossKernels
from .model import ModelConfig, TinyLlama, config_from, config_values
from .optim import OptimConfig, build_optimizers, rate_factor, set_rates

HERE = Path(__file__).resolve().parent
SLICE_TOKENS = 8192  # tokens of one forward and backward pass; a step accumulates several


@dataclass
class Settings:
    """Where the work lies and how long to run."""

    work: Path
    minutes: float
    config: dict[str, Any] = field(default_factory=dict)
    steps: int | None = None
    save_seconds: float = 180.0
    compiled: bool = True


def read_config(path: Path | None = None) -> dict[str, Any]:
    """The parsed configuration file."""
    return tomllib.loads((path or HERE / "config.toml").read_text(encoding="utf-8"))


def shape_of(config: dict[str, Any], name: str) -> ModelConfig:
    """Shape of the target or the draft."""
    return config_from({"vocab_size": config["tokenizer"]["vocab_size"], **config[name]})


def pick_device() -> torch.device:
    """The accelerator when there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Progress:
    """One line that says where a run stands; rewritten in place on a terminal, appended otherwise."""

    def __init__(self, label: str, every: float = 10.0) -> None:
        self.label, self.every = label, every
        self.loss, self.agree, self.count, self.tokens, self.since = 0.0, 0.0, 0, 0, time.time()

    def add(self, loss: float, agree: float, tokens: int) -> None:
        """Count one step: its mean loss in nats a token, its agreement with the teacher, its tokens."""
        self.loss, self.agree = self.loss + loss, self.agree + agree
        self.count, self.tokens = self.count + 1, self.tokens + tokens

    def show(self, step: int, seen: int, progress: float, left: float) -> None:
        """Print when it is time."""
        now = time.time()
        if now - self.since < self.every or not self.count:
            return
        agree = f"  agree {self.agree / self.count:.3f}" if self.agree else ""
        line = (
            f"{self.label} {progress:6.1%}  step {step}  loss {self.loss / self.count:.4f}{agree}  {seen / 1e6:.2f}M tokens"
            f"  {self.tokens / (now - self.since):,.0f} tok/s  {left / 60:.1f} min left"
        )
        print(f"\r{line}" if sys.stdout.isatty() else line, end="" if sys.stdout.isatty() else "\n", flush=True)
        self.loss, self.agree, self.count, self.tokens, self.since = 0.0, 0.0, 0, 0, now


class Trainer(ABC):
    """State and loop of one model's training; a subclass says what the loss is."""

    name = ""
    stages_key = ""
    optimizer_key = ""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        config = settings.config
        self.shape = shape_of(config, self.name)
        self.device = pick_device()
        self.model = TinyLlama(self.shape)
        self.model.init_weights(config["seed"])
        self.prepare_model()
        self.model.to(self.device)
        if settings.compiled:
            self.model.use_compiled_blocks()
        self.kernels = LossKernels(settings.compiled)
        self.optim = OptimConfig(**config[self.optimizer_key])
        self.optimizers = build_optimizers(self.model, self.optim)
        self.stages = [Stage(**stage) for stage in config[self.stages_key]]
        self.reader = Reader(settings.work, config["seed"])
        self.path = settings.work / f"{self.name}.pt"
        self.step, self.seen, self.spent = 0, 0, 0.0
        self._resume()

    def prepare_model(self) -> None:  # noqa: B027  a hook that most have no use for
        """Change the fresh weights before they move to the device."""

    @abstractmethod
    def slice_loss(self, part: Tensor, weight: float) -> tuple[Tensor, Tensor]:
        """(loss to minimise, rows that agree with a teacher) of rows `part` [n, length + 1], every token weighing `weight`."""

    def _resume(self) -> None:
        saved = load_checkpoint(self.path)
        if saved is None:
            return
        self.model.load_state_dict(saved["model"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.reader.restore(saved["reader"])
        self.step, self.seen, self.spent = saved["step"], saved["seen"], saved["spent"]

    def save(self, spent: float) -> None:
        """Checkpoint everything the continuation depends on; `spent` in seconds."""
        save_checkpoint(
            self.path,
            {
                "model": self.model.state_dict(),
                "shape": config_values(self.shape),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "reader": self.reader.state(),
                "step": self.step,
                "seen": self.seen,
                "spent": spent,
            },
        )

    def train_step(self, stage: Stage, factor: float) -> tuple[float, float]:
        """One optimiser step; returns the mean loss in nats a token and the share of agreeing rows."""
        batch = self.reader.batch(self.settings.config["mix"][stage.mix], stage.rows, stage.length).to(self.device)
        total, agree = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        count = stage.rows * stage.length
        for part in batch.split(max(1, SLICE_TOKENS // stage.length)):
            loss, same = self.slice_loss(part, 1.0 / count)
            loss.backward()
            total += loss.detach()
            agree += same
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.optim.clip)
        set_rates(self.optimizers, self.optim, factor)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return float(total), float(agree) / count

    def run(self, stop_after: int | None = None) -> None:
        """Train until the budget is spent (or for `stop_after` more steps), saving on the way and at the end."""
        budget = Budget(self.settings.minutes, self.settings.steps, self.spent)
        line, saved_at, done = Progress(self.name), time.time(), 0
        while budget.progress(self.step) < 1.0 and (stop_after is None or done < stop_after):
            progress = budget.progress(self.step)
            stage = stage_at(self.stages, progress)
            loss, agree = self.train_step(stage, rate_factor(self.optim, self.step, progress))
            self.step, done = self.step + 1, done + 1
            self.seen += stage.rows * stage.length
            line.add(loss, agree, stage.rows * stage.length)
            line.show(self.step, self.seen, progress, budget.seconds_left(self.step))
            if time.time() - saved_at >= self.settings.save_seconds:
                self.save(budget.spent())
                saved_at = time.time()
        self.spent = budget.spent()
        self.save(self.spent)


def arguments(description: str, minutes: float) -> argparse.ArgumentParser:
    """The arguments every stage of the recipe takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("BUNDLED_DATA", "../shared/data")))
    parser.add_argument("--work", type=Path, default=Path(os.environ.get("BUNDLED_WORK", "build/bundled")))
    parser.add_argument("--config", type=Path, default=HERE / "config.toml")
    parser.add_argument("--minutes", type=float, default=minutes, help="wall-clock budget, at most 150")
    parser.add_argument("--steps", type=int, default=None, help="count steps instead of time: repeatable, for tests")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--eager", action="store_true", help="do not compile the layers")
    return parser


def settings_from(options: argparse.Namespace) -> Settings:
    """The settings a command line asks for; also sets the number of torch threads."""
    torch.set_num_threads(options.threads)
    config = read_config(options.config)
    return Settings(options.work, options.minutes, config, options.steps, compiled=not options.eager)
