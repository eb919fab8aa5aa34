"""The real runner: one packed batch in, logits of the wanted rows out."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headrace.core.batch import Batch, Ints
from headrace.core.errors import OutOfMemory, UnsupportedModel
from headrace.core.protocols import StepResult
from headrace.models import families
from headrace.models.attention import get_backend
from headrace.models.attention.retrieving import without_context
from headrace.models.cache.planes import Planes, add_planes
from headrace.models.fused.pinned import Pinned
from headrace.models.graphs import Capture, CudaCapture, Graphs
from headrace.models.hook import Step, install
from headrace.models.parallel.layers import is_shared
from headrace.models.stack import Forward, forward_of

if TYPE_CHECKING:
    from headrace.models.attention import AttentionStep
    from headrace.models.attention.gpu_static import StaticStep
    from headrace.models.attention.interface import AttentionBackend
    from headrace.models.attention.retrieving import Retriever
    from headrace.models.cache.slots import SlotPool
    from headrace.models.loaded import LoadedModel


class ModelRunner:
    """Runs a model over batches whose K and V live in a slot pool.

    Adds the planes of :func:`headrace.models.cache.planes.add_planes` to ``pool`` and points the model's attention at them; the module
    stays usable only through the runner.

    Args:
        model: what to run.
        pool: where K and V live; one runner per pool and model.
        attention: "auto" or a backend's name.
        kv_cache_dtype: "auto" keeps K and V in the model's dtype, "int8" as codes with a scale per K/V head.
        graphs: capture small steps and replay them (:mod:`headrace.models.graphs`) where the model is on a GPU, attends by Triton and
            is not shared; or what to capture with.
        retriever: attends to segments that read a share of their context; None reads everything.

    Raises:
        InvalidRequest: for an attention backend that does not exist or cannot run on the model's device, or another ``kv_cache_dtype``.
        UnsupportedModel: for a model whose forward cannot be packed.
    """

    def __init__(
        self,
        model: LoadedModel,
        pool: SlotPool,
        attention: str = "auto",
        kv_cache_dtype: str = "auto",
        graphs: bool | Capture = True,
        retriever: Retriever | None = None,
    ) -> None:
        self._retriever = retriever
        self._device = torch.device(model.device)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # Triton launches on the current one, whatever its tensors say
        self._backend = get_backend(attention, self._device)
        self._planes = add_planes(pool, model.config, model.dtype, self._device, kv_cache_dtype)
        install(model.module)
        self._forward = _forward_of(model.module, self._backend)
        self._native = _native_of(self._forward, self._backend, self._planes)
        self._plain = bool(getattr(self._forward, "plain", False))  # a retriever may have its say in every native layer
        self._vocab_size = model.card.vocab_size
        self._graphs = self._graphs_of(model, pool, graphs)

    @property
    def vocab_size(self) -> int:
        """Width of the logits, which may exceed the tokenizer's (padded embeddings)."""
        return self._vocab_size

    @property
    def attention(self) -> str:
        """Name of the attention backend in use."""
        return self._backend.name

    @property
    def kv_cache_dtype(self) -> str:
        """How K and V are kept: "int8", or the model's dtype."""
        return str(self._planes.keys[0].dtype).removeprefix("torch.")

    @property
    def graphs(self) -> Graphs | None:
        """The captured steps, where steps are captured."""
        return self._graphs

    def run(self, batch: Batch) -> StepResult:
        """Run one step.

        Returns:
            float32 logits [R, vocabulary] of ``batch.head_rows`` on the model's device.

        Raises:
            OutOfMemory: when the step does not fit the device; slots it wrote hold nothing of use.
        """
        started = time.perf_counter()
        try:
            logits = self._logits(batch)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            raise OutOfMemory(
                f"a step of {batch.tokens} tokens over {batch.shape.context} context tokens does not fit the memory of "
                f"{self._device}: lower the step's token budget or the K and V share (--kv-gib)"
            ) from error
        return StepResult(logits, forward_s=time.perf_counter() - started)

    def forget(self, sequence: int) -> None:
        """Let go of what is kept about a sequence."""
        if self._retriever is not None:
            self._retriever.forget(sequence)

    @torch.inference_mode()
    def _logits(self, batch: Batch) -> Tensor:
        taken = None
        if batch.retrieving and self._retriever is not None:
            taken = self._retriever.begin(batch, self._planes)
        if taken is None:
            return self._by_modules(batch) if self._native is None else self._native(batch, self._planes)
        bare = without_context(batch, taken)
        if self._native is not None and self._plain:
            return self._native(bare, self._planes, self._retriever)
        return self._by_modules(batch, bare)

    def _by_modules(self, batch: Batch, bare: Batch | None = None) -> Tensor:
        replayed = None if self._graphs is None or bare is not None else self._graphs.run(batch)
        if replayed is not None:
            return replayed
        attention = self._backend.prepare(batch, self._device)
        # Rows are distinct, so as many as there are tokens means all of them, in order: nothing to select.
        rows = None if len(batch.head_rows) == batch.tokens else self._tensor(batch.head_rows)
        ids, positions = self._tensor(batch.ids), self._tensor(batch.positions)
        aside = None if bare is None else self._backend.prepare(bare, self._device)
        return self._through(attention, ids, positions, rows, self._tensor(batch.write_slots), aside)

    def _through(
        self,
        attention: AttentionStep,
        ids: Tensor,
        positions: Tensor,
        rows: Tensor | None,
        writes: Tensor,
        bare: AttentionStep | None = None,
    ) -> Tensor:
        """Logits of ``rows``, of all when None; with ``bare``, the retriever attends to some segments."""
        step = Step(
            backend=self._backend,
            attention=attention,
            keys=self._planes.keys,
            values=self._planes.values,
            scales=self._planes.scales,
            write_slots=writes.long(),
            retriever=None if bare is None else self._retriever,
            bare=bare,
        )
        logits = self._forward.logits(ids, positions, rows, step)
        if step.calls != len(step.keys):
            raise UnsupportedModel(
                f"{step.calls} of {len(step.keys)} layers asked for attention through the attention interface: "
                "the rest compute it themselves. Serve this model with plain transformers instead.",
                field="model",
            )
        return logits

    def _graphs_of(self, model: LoadedModel, pool: SlotPool, wanted: bool | Capture) -> Graphs | None:
        if wanted is False or self._backend.name != "triton" or is_shared(model.module):
            return None
        if wanted is True and self._device.type != "cuda":
            return None

        def forward(step: StaticStep) -> Tensor:
            return self._through(step, step.ids, step.positions, None, step.writes)

        _, kv_heads, _ = families.kv_shape(model.config)
        group = model.config.num_attention_heads // kv_heads
        slot = int(pool.take(1)[0])
        return Graphs(forward, slot, group, self._device, CudaCapture() if wanted is True else wanted)

    def _tensor(self, array: Ints) -> Tensor:
        """``array`` on the model's device; on the CPU a view."""
        tensor = torch.from_numpy(array)
        return tensor if self._device.type == "cpu" else tensor.to(self._device)


def _forward_of(module: Any, backend: AttentionBackend) -> Forward:
    """The native step around packed layers where attention can run inside of it, else the modules themselves."""
    packed = any(isinstance(child, Pinned) for child in module.modules())
    if not packed or backend.name != "numba" or families.anatomy(module) is None or is_shared(module):
        return forward_of(module)
    from headrace.models.fused.stack import NativeStack

    return NativeStack(module)


def _native_of(forward: Any, backend: AttentionBackend, planes: Planes) -> Callable[..., Tensor] | None:
    """What runs a batch without any module in the way, where the whole model is native."""
    whole = getattr(forward, "whole", None)
    return forward.run if whole is not None and whole(backend, planes) else None


def _out_of_memory(error: Exception) -> bool:
    """CUDA raises its own class, numpy and numba Python's; torch's CPU allocator a bare RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
