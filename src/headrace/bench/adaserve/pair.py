"""The pair of part two: the bundled target's text at a bigger model's cost, its bundled draft, and engines around them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.core.cache import cache_folder
from headrace.core.policy import Limits

if TYPE_CHECKING:
    from headrace.core.config import EngineConfig
    from headrace.core.policy import Policy
    from headrace.engine.drafting import Drafting
    from headrace.engine.engine import Engine

DRAFT = "bundled-draft"
LIMITS = Limits(max_sequences=16, max_step_tokens=256, max_prefill_tokens=256)


@dataclass(frozen=True, slots=True)
class Target:
    """What is served.

    Attributes:
        shape: whose cost the padded target has, see :mod:`headrace.bench.checkpoints.shapes`.
        quantize: "int8", or None for float32.
        context: prompt and answer, tokens.
        threads: of the CPU; None takes what the engine would.
    """

    shape: str = "0.3b"
    quantize: str | None = "int8"
    context: int = 160
    threads: int | None = None

    def config(self, model: str) -> EngineConfig:
        """An engine's configuration around the checkpoint ``model``."""
        from headrace.core.config import EngineConfig

        return EngineConfig(
            model=model, dtype="float32", quantize=self.quantize, policy="adaserve", draft=DRAFT, limits=LIMITS,
            kv_gib=0.5, max_context=self.context, prefix_cache=False, profile="measure", threads=self.threads,
        )  # fmt: skip


def padded_target(shape: str, report: Callable[[str], None] = lambda line: None) -> Path:
    """The folder of the bundled target padded to ``shape``, written into the user's cache on first use.

    Raises:
        InvalidRequest: there is no such shape, or it cannot hold the bundled target.
    """
    from headrace.bench.checkpoints.padding import pad
    from headrace.bench.checkpoints.shapes import shape_named
    from headrace.models.checkpoints.hub import resolve

    source, wanted = resolve("bundled"), shape_named(shape)
    digest = hashlib.sha256()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        digest.update((source / name).read_bytes())
    folder = cache_folder("bench") / f"padded-{shape}-{digest.hexdigest()[:12]}"
    if not (folder / "complete").exists():
        report(f"padding the bundled target to the cost of {shape}")
        pad(source, folder, wanted)
        (folder / "complete").touch()
    return folder


@dataclass(slots=True)
class Bench:
    """An engine that changes its policy between runs, each policy with beliefs of its own about drafts.

    Attributes:
        engine: idle between runs.
    """

    engine: Engine
    _known: dict[str, tuple[Policy, Drafting | None]] = field(default_factory=dict)

    def use(self, policy: str) -> Engine:
        """The engine under ``policy``, which goes on with what it learnt in its last run."""
        from headrace.compose import get_policy
        from headrace.speculation.calibration import OnlineCalibration

        if policy not in self._known:
            drafting = self.engine.drafting
            self._known[policy] = get_policy(policy), drafting and drafting.afresh(OnlineCalibration())
        self.engine.policy, self.engine.drafting = self._known[policy]
        return self.engine

    def clear(self) -> None:
        """Abort what is open and hand out the ends."""
        self.engine.abort_all()
        while self.engine.busy:
            self.engine.step()


def build(target: Target, model: str | None = None, report: Callable[[str], None] = lambda line: None) -> Bench:
    """An engine around the padded target (or around ``model``), its steps measured, warmed up."""
    from headrace.compose import build_engine

    path = model or str(padded_target(target.shape, report))
    report("loading the pair and measuring its steps")
    return Bench(build_engine(target.config(path), progress=False))
