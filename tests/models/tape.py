"""A stand-in for CUDA graphs on the CPU: records every operation with its tensors and does the same ones again.

As in a graph, Python runs once: sizes, addresses and whatever the host decided are what they were when it was recorded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from headrace.models.attention import gpu_kernel


class Tape(TorchDispatchMode):
    """Operations in the order they ran."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], None]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append(functools.partial(self._again, func, args, kwargs or {}, out))
        return out

    @staticmethod
    def _again(func: Any, args: Any, kwargs: Any, out: Any) -> None:
        for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
            if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                old.copy_(new)

    def play(self) -> None:
        for call in self.calls:
            call()


class TapeCapture:
    """A :class:`headrace.models.graphs.Capture` onto tapes; kernels launched by Triton's interpreter are recorded too.

    Attributes:
        played: how often any tape was played.
    """

    def __init__(self, monkeypatch: Any, *, silent: bool = False) -> None:
        self.played, self._silent = 0, silent
        self._tape: Tape | None = None
        self._launch = gpu_kernel.run
        monkeypatch.setattr(gpu_kernel, "run", self._recorded_launch)

    def _recorded_launch(self, *args: Any, **kwargs: Any) -> None:
        with _disable_current_modes():
            self._launch(*args, **kwargs)
        if self._tape is not None:
            self._tape.calls.append(functools.partial(self._launch, *args, **kwargs))

    def __call__(self, run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        run()
        self._tape = tape = Tape()
        with tape:
            result = run()
        self._tape = None

        def replay() -> None:
            self.played += 1
            if not self._silent:
                tape.play()

        return replay, result
