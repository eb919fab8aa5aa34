"""The real runner: one packed batch in, logits of the wanted rows out."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headrace.core.batch import Batch, Ints
from headrace.core.errors import OutOfMemory, UnsupportedModel
from headrace.core.protocols import StepResult
from headrace.models import families
from headrace.models.attention import get_backend
from headrace.models.hook import Step, install
from headrace.models.pinned import Pinned
from headrace.models.planes import add_planes
from headrace.models.stack import Forward, forward_of

if TYPE_CHECKING:
    from headrace.models.attention.interface import AttentionBackend
    from headrace.models.loaded import LoadedModel
    from headrace.models.slots import SlotPool


class ModelRunner:
    """Runs a model over batches whose K and V live in a slot pool.

    Adds the planes of :func:`headrace.models.planes.add_planes` to ``pool`` and points the model's attention at them; the module
    stays usable only through the runner.

    Args:
        model: what to run.
        pool: where K and V live; one runner per pool and model.
        attention: "auto" or a backend's name.
        kv_cache_dtype: "auto" keeps K and V in the model's dtype, "int8" as codes with a scale per K/V head.

    Raises:
        InvalidRequest: for an attention backend that does not exist or cannot run on the model's device, or another ``kv_cache_dtype``.
        UnsupportedModel: for a model whose forward cannot be packed.
    """

    def __init__(
        self, model: LoadedModel, pool: SlotPool, attention: str = "auto", kv_cache_dtype: str = "auto"
    ) -> None:
        self._device = torch.device(model.device)
        self._backend = get_backend(attention, self._device)
        self._planes = add_planes(pool, model.config, model.dtype, self._device, kv_cache_dtype)
        install(model.module)
        self._forward = _forward_of(model.module, self._backend)
        self._vocab_size = model.card.vocab_size

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

    @torch.inference_mode()
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

    def _logits(self, batch: Batch) -> Tensor:
        step = Step(
            backend=self._backend,
            attention=self._backend.prepare(batch, self._device),
            keys=self._planes.keys,
            values=self._planes.values,
            scales=self._planes.scales,
            write_slots=self._tensor(batch.write_slots).long(),
        )
        # Rows are distinct, so as many as there are tokens means all of them, in order: nothing to select.
        rows = None if len(batch.head_rows) == batch.tokens else self._tensor(batch.head_rows)
        logits = self._forward.logits(self._tensor(batch.ids), self._tensor(batch.positions), rows, step)
        if step.calls != len(step.keys):
            raise UnsupportedModel(
                f"{step.calls} of {len(step.keys)} layers asked for attention through the attention interface: "
                "the rest compute it themselves. Serve this model with plain transformers instead.",
                field="model",
            )
        return logits

    def _tensor(self, array: Ints) -> Tensor:
        """``array`` on the model's device; on the CPU a view."""
        tensor = torch.from_numpy(array)
        return tensor if self._device.type == "cpu" else tensor.to(self._device)


def _forward_of(module: Any, backend: AttentionBackend) -> Forward:
    """The native step around packed layers where attention can run inside of it, else the modules themselves."""
    packed = any(isinstance(child, Pinned) for child in module.modules())
    if not packed or backend.name != "numba" or families.anatomy(module) is None:
        return forward_of(module)
    from headrace.models.native_stack import NativeStack

    return NativeStack(module)


def _out_of_memory(error: Exception) -> bool:
    """CUDA raises its own class, numpy and numba Python's; torch's CPU allocator a bare RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
