"""Attention on the GPU: Triton kernels over slots, long contexts split and merged by log-sum-exp."""

from __future__ import annotations

import importlib.util
import os
from typing import ClassVar

import numpy as np
import torch

from headrace.core.batch import Batch
from headrace.models.attention.gpu_cut import NO_WINDOW
from headrace.models.attention.gpu_step import TritonStep
from headrace.models.attention.interface import AttentionBackend


class TritonAttention(AttentionBackend):
    """The GPU's fast path; with ``TRITON_INTERPRET=1`` set before triton is imported it also runs, slowly, on CPU tensors."""

    name: ClassVar[str] = "triton"

    @staticmethod
    def problem(kind: str) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed (pip install triton)"
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        if kind != "cuda" or not torch.cuda.is_available():
            return "it needs a CUDA device"
        return None

    def prepare(self, batch: Batch, device: torch.device) -> TritonStep:
        def put(array: np.ndarray) -> torch.Tensor:
            # A copy: the batch's buffers are written again while the device may still be reading.
            return torch.from_numpy(array.copy()).to(device, non_blocking=True)

        return TritonStep(
            batch,
            device,
            positions=put(batch.positions),
            writes=put(batch.write_slots),
            slots=put(batch.context_slots),
            words=put(batch.mask_words),
        )

    def attend(
        self,
        q: torch.Tensor,
        k_plane: torch.Tensor,
        v_plane: torch.Tensor,
        step: TritonStep,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
        scales: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        from headrace.models.attention import gpu_kernel

        heads, group = k_plane.shape[1], q.shape[1] // k_plane.shape[1]
        out = q.new_empty(q.shape[0], q.shape[1], v_plane.shape[2])
        for block, launch in step.launches_of(group, window).items():
            gpu_kernel.run(
                q.contiguous(),
                k_plane,
                v_plane,
                out,
                sinks,
                scales,
                step,
                launch,
                heads=heads,
                block=block,
                scale=scale,
                window=NO_WINDOW if window is None else window,
                softcap=softcap,
            )
        return out
