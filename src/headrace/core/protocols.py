"""The seams between floors: clock, runner and service."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from headrace.core.batch import Batch, StepShape
from headrace.core.outputs import EngineStats, SequenceDelta
from headrace.core.request import Request

ServiceState = Literal["loading", "ready", "draining", "failed"]


class Clock(Protocol):
    """A source of time."""

    def now(self) -> float:
        """Seconds since some fixed moment."""


class Profile(Protocol):
    """What a step costs on this machine."""

    def cost(self, shape: StepShape) -> float:
        """Predicted milliseconds of a step of ``shape``."""


class StepObserver(Protocol):
    """Is told what real steps took: how a profile learns."""

    def observe(self, shape: StepShape, ms: float) -> None:
        """A step of ``shape`` took ``ms`` milliseconds, from planning to committing."""

    def report(self, stats: EngineStats) -> None:
        """Write into ``stats`` how well steps were predicted."""

    def close(self) -> None:
        """The engine ends: keep what was learnt. Never raises."""


@dataclass(slots=True)
class StepResult:
    """What a runner gives back.

    Attributes:
        logits: [R, vocabulary] float32 for ``batch.head_rows``, a tensor of the runner's device (None on a stage without a head).
        hidden: [N, hidden] of the last layer run, when asked for.
        forward_s: seconds spent in the forward.
    """

    logits: Any
    hidden: Any = None
    forward_s: float = 0.0


class Runner(Protocol):
    """Executes batches: a real model, a simulated one, or a stage of a cluster."""

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""

    def run(self, batch: Batch) -> StepResult:
        """Run one step. Raises :class:`headrace.core.errors.OutOfMemory` when it does not fit."""


@runtime_checkable
class Closeable(Protocol):
    """A runner that holds something which outlives its last reference, such as other processes."""

    def close(self) -> None:
        """Let go of it; the runner cannot run afterwards."""


@runtime_checkable
class Remembering(Protocol):
    """A runner that keeps something about sequences from step to step, such as an index of their keys."""

    def forget(self, sequence: int) -> None:
        """The sequence leaves its slots, which are still its own at this moment; unknown numbers are ignored."""


@dataclass(frozen=True, slots=True)
class Quality:
    """What quantisation costs on a built-in text.

    Attributes:
        tokens: how many were predicted.
        nll_before, nll: their mean negative log-likelihood in nats, as the checkpoint is and quantised.
        same_greedy: share of places where the likeliest token stayed the same.
    """

    tokens: int
    nll_before: float
    nll: float
    same_greedy: float

    def __str__(self) -> str:
        return (
            f"{self.nll_before:.3f} to {self.nll:.3f} nats a token ({self.nll - self.nll_before:+.4f}), "
            f"{self.same_greedy:.1%} of {self.tokens} likeliest tokens the same"
        )


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What faces need to know of a model.

    ``context`` is the longest prompt plus output in tokens; ``stop_ids`` end generation unless ignored. ``quantization`` names how
    weights were rounded, here or by the checkpoint's maker ("" for not at all), ``kv_cache_dtype`` how K and V are kept, and
    ``quality`` what both cost where that was measured.
    """

    name: str
    path: str
    context: int
    vocab_size: int
    stop_ids: tuple[int, ...]
    created: int = 0
    dtype: str = ""
    parameters: int = 0
    quantization: str = ""
    kv_cache_dtype: str = ""
    quality: Quality | None = None


class Service(Protocol):
    """All a server knows of an engine: it cannot tell one machine from a cluster."""

    @property
    def card(self) -> ModelCard:
        """The served model; only valid once ``state`` is "ready"."""

    @property
    def state(self) -> ServiceState:
        """Where the service stands."""

    def submit(self, request: Request) -> AsyncIterator[SequenceDelta]:
        """Queue a request and stream its deltas until every sequence has a ``reason``.

        Raises :class:`Overloaded`, :class:`EngineUnavailable` or :class:`InvalidRequest` before the first delta. Closing the iterator
        cancels the request.
        """

    def cancel(self, request_id: str, index: int | None = None) -> None:
        """Stop a request (or one of its sequences) at the next step; unknown ids are ignored."""

    async def stats(self) -> EngineStats:
        """A snapshot for metrics."""

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests and wait for the open ones, at most ``timeout_s`` seconds."""
