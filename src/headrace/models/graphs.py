"""Steps captured once and replayed: a decode step on a GPU is hundreds of kernels, and launching them costs more than they do.

A graph replays the kernels it saw, with the sizes and addresses it saw. So batches are padded to a few sizes (the key), their
numbers are copied to buffers that never move, and one graph is captured for each key at its first use. Rows that only pad the
batch write to a slot that is kept for them. Steps with long prompts, which no key covers, run as ever.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from headrace.core.batch import Batch
from headrace.models.attention.gpu_static import Key, StaticStep, key_of

log = logging.getLogger(__name__)

MOST_GRAPHS = 64
"""Graphs kept; they share their memory, so what each costs is the time to capture it again."""

Forward = Callable[[StaticStep], Tensor]


class Capture(Protocol):
    """Records what a function does on the device."""

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Run ``run`` until it settles, then record it.

        Returns:
            A function that does the same again with what its inputs hold by then, and the tensor in which the result appears.
        """


class CudaCapture:
    """Capture by CUDA graphs, all of which share one pool of memory."""

    def __init__(self) -> None:
        cuda: Any = torch.cuda
        self._cuda, self._pool = cuda, cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """See :class:`Capture`."""
        cuda = self._cuda
        side = cuda.Stream()
        side.wait_stream(cuda.current_stream())
        with cuda.stream(side):
            for _ in range(2):  # kernels compile and workspaces are taken outside of the graph
                run()
        cuda.current_stream().wait_stream(side)
        graph = cuda.CUDAGraph()
        with cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = run()
        return graph.replay, result


@dataclass(slots=True)
class _Graph:
    step: StaticStep
    replay: Callable[[], None]
    logits: Tensor


class Graphs:
    """The graphs of one model, by key.

    Args:
        forward: float32[rows, vocabulary] logits of all rows of a step.
        slot: of the pool, for rows that only pad.
        group: query heads per K/V head.
        device: where the model is.
        capture: how to record.
    """

    def __init__(self, forward: Forward, slot: int, group: int, device: torch.device, capture: Capture) -> None:
        self._forward, self._slot, self._group, self._device, self._capture = forward, slot, group, device, capture
        self._graphs: OrderedDict[Key, _Graph] = OrderedDict()
        self.obstacle: str | None = None
        """Why nothing is captured any more; None while all is well."""

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, batch: Batch) -> Tensor | None:
        """Logits of the wanted rows, float32[R, vocabulary]; None for a step that no graph can run."""
        key = None if self.obstacle is not None else key_of(batch, self._group)
        graph = None if key is None else self._ready(key, batch)
        if graph is None:
            return None
        graph.replay()
        # Copied out: the next replay writes over the graph's own.
        rows = torch.from_numpy(batch.head_rows.copy()).to(self._device, non_blocking=True)
        return graph.logits.index_select(0, rows)

    def _ready(self, key: Key, batch: Batch) -> _Graph | None:
        """The graph of ``key`` with ``batch`` in its buffers."""
        graph = self._graphs.get(key)
        if graph is not None:
            self._graphs.move_to_end(key)
            graph.step.fill(batch)
            return graph
        step = StaticStep(key, self._slot, self._device)
        step.fill(batch)
        try:
            graph = _Graph(step, *self._capture(lambda: self._forward(step)))
        except RuntimeError as error:
            self._graphs.clear()
            self.obstacle = str(error).strip().partition("\n")[0]
            log.warning("steps run without graphs from here on: one could not be captured (%s)", self.obstacle)
            return None
        self._graphs[key] = graph
        if len(self._graphs) > MOST_GRAPHS:
            self._graphs.popitem(last=False)
        return graph
