"""The configuration of an engine: plain data that travels to the engine's process."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, fields
from typing import Any

from headrace.core.errors import InvalidRequest
from headrace.core.policy import Limits
from headrace.core.retrieval import KVMode, Retrieval

ALIASES = {"quantization": "quantize", "tensor_parallel_size": "tp"}
"""What users of vLLM call our options."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything needed to build an engine.

    Attributes:
        model: a local folder, a hub name, or "bundled" for the pair that ships with headrace.
        served_name: the name clients use; the model's own by default.
        dtype: "auto", "float32", "bfloat16" or "float16".
        device: "auto", "cpu", "cuda" or "cuda:0".
        attention: "auto" or a backend's name ("reference", "numba", "triton").
        linears: "auto", "module" (the checkpoint's own) or "native" (compiled kernels, in one call per step where the layers allow it).
        policy: a registered policy's name.
        draft: where drafts come from, for policies that speculate: "auto" (the draft that ships with the bundled
            model, and n-grams), "ngram", "off", or a checkpoint with the model's vocabulary, as a folder or a hub name.
        limits: bounds of a step.
        quantize: round the weights while loading: "int8" or "nf4"; None leaves them.
        kv_gib: GiB for K and V; None takes a share of the free memory.
        kv_cache_dtype: "auto" (the model's dtype) or "int8", which holds nearly four times the tokens of float32.
        max_context: longest prompt plus output in tokens; None takes the model's own.
        kv: how decode steps read the context of requests that do not say: "full", "pq" (a share that an index points at) or "auto"
            (that in long contexts only).
        kv_budget: the share, in (0, 1].
        prefix_cache: share the K and V of equal prefixes between requests.
        max_queue: waiting requests above which new ones are refused.
        trust_remote_code: run Python code that comes with a checkpoint.
        profile: what steps cost: "auto" (as stored, else measured, which holds the start up for some seconds), "measure" (anew), "off",
            or the file to keep it in. ``HEADRACE_PROFILE`` where it is set, else "auto".
        enforce_eager: launch every kernel of every step on GPUs, rather than replay captured ones.
        tp: ranks that share every layer of the model (tensor parallelism): one GPU each, or on the CPU one process each.
        threads: CPU threads for the model; None takes ``OMP_NUM_THREADS`` where it is set, else all cores available to the process.
    """

    model: str = "bundled"
    served_name: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    attention: str = "auto"
    linears: str = "auto"
    quantize: str | None = None
    policy: str = "adaserve"
    draft: str = "auto"
    limits: Limits = field(default_factory=Limits)
    kv_gib: float | None = None
    kv_cache_dtype: str = "auto"
    max_context: int | None = None
    kv: KVMode = "full"
    kv_budget: float = 0.1
    prefix_cache: bool = True
    max_queue: int = 256
    trust_remote_code: bool = False
    profile: str = field(default_factory=lambda: os.environ.get("HEADRACE_PROFILE") or "auto")
    enforce_eager: bool = False
    tp: int = 1
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("kv_gib", "max_context", "threads"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise InvalidRequest(f"{name} is {value!r}: give a number above 0, or leave it out", field=name)
        Retrieval(self.kv, self.kv_budget)
        if self.tp < 1:
            raise InvalidRequest(f"tp is {self.tp}: give at least 1", field="tp")
        if self.max_queue < 1:
            raise InvalidRequest(f"max_queue is {self.max_queue}: give at least 1", field="max_queue")
        for name in ("max_sequences", "max_step_tokens", "max_prefill_tokens"):
            if getattr(self.limits, name) < 1:
                raise InvalidRequest(f"{name} is {getattr(self.limits, name)}: give at least 1", field=name)
        if self.limits.max_sequences > self.limits.max_step_tokens:
            raise InvalidRequest(
                f"max_sequences is {self.limits.max_sequences}, above max_step_tokens {self.limits.max_step_tokens}: "
                "every running sequence needs a row in each step, so lower the one or raise the other",
                field="max_sequences",
            )

    @property
    def retrieval(self) -> Retrieval:
        """``kv`` and ``kv_budget``."""
        return Retrieval(self.kv, self.kv_budget)

    @classmethod
    def from_options(cls, **options: Any) -> EngineConfig:
        """A configuration from flat options: the fields of this class, those of its :class:`Limits`, and vLLM's names for some.

        Raises:
            InvalidRequest: an option does not exist or is out of range.
        """
        of_limits = [f.name for f in fields(Limits)]
        known = [f.name for f in fields(cls) if f.name != "limits"] + of_limits
        options = {ALIASES.get(name, name): value for name, value in options.items()}
        for name in options:
            if name not in known:
                raise InvalidRequest(f"no engine option {name!r}; there are {', '.join(known)}", field=name)
        limits = Limits(**{name: options.pop(name) for name in of_limits if name in options})
        return cls(**options, limits=limits)
