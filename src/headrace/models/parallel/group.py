"""The group of ranks that hold one model, and how this process joins it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor

from headrace.core.errors import EngineUnavailable, InvalidRequest

JOIN_TIMEOUT = timedelta(minutes=30)
"""How long ranks wait for each other: weights of a large model may come from a slow disk for one of them."""


@dataclass(frozen=True, slots=True)
class Group:
    """Where this process stands among the ranks.

    Attributes:
        rank: 0 is the engine; its logits are the ones that count.
        size: ranks in all, at least 2.
    """

    rank: int
    size: int

    def sum_(self, x: Tensor) -> Tensor:
        """``x``, replaced by its sum over all ranks."""
        torch.distributed.all_reduce(x)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """The ranks' ``x`` [..., n] side by side, [..., size * n], on every rank."""
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)]
        torch.distributed.all_gather(parts, x)
        return torch.cat(parts, -1)

    def gather_first(self, x: Tensor) -> Tensor:
        """As :meth:`gather` on rank 0; the others only send and get their own ``x`` back."""
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)] if self.rank == 0 else None
        torch.distributed.gather(x, parts, dst=0)
        return x if parts is None else torch.cat(parts, -1)


def join(group: Group, store: Path, device: torch.device) -> None:
    """Meet the other ranks at a file that all of them can write; gloo on the CPU, NCCL on GPUs.

    Raises:
        EngineUnavailable: this process belongs to a group of somebody else's making already.
    """
    if torch.distributed.is_initialized():
        raise EngineUnavailable(
            "this process has a torch.distributed group already: end it first (destroy_process_group), or close the other LLM"
        )
    with environment(group, device):
        torch.distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"file://{store}",
            rank=group.rank,
            world_size=group.size,
            timeout=JOIN_TIMEOUT,
            device_id=device if device.type == "cuda" else None,
        )


def leave() -> None:
    """Let go of the group, if there is one."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def environment(group: Group, device: torch.device) -> Iterator[None]:
    """Meanwhile the variables that transformers, gloo and NCCL read say what is so here: one node, loopback, our numbers."""
    said = {"RANK": str(group.rank), "LOCAL_RANK": str(device.index or 0), "WORLD_SIZE": str(group.size)}
    if device.type == "cpu":  # gloo would else look the machine's name up, which may lead nowhere
        said["GLOO_SOCKET_IFNAME"] = "lo" if sys.platform.startswith("linux") else "lo0"
    before = {name: os.environ.get(name) for name in said}
    os.environ.update(said)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def device_of(rank: int, device: str, size: int) -> torch.device:
    """The device of a rank when the configuration says ``device``: its own GPU, or the CPU that all share.

    Raises:
        InvalidRequest: fewer GPUs than ranks, one GPU named for all of them, or a torch build that cannot split a model on the CPU.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    kind = ("cuda" if gpus else "cpu") if device == "auto" else device
    if kind not in ("cpu", "cuda"):
        raise InvalidRequest(
            f"device is {device!r}, and tp {size} takes the GPUs 0 to {size - 1}: give cuda, and choose among them with "
            "CUDA_VISIBLE_DEVICES",
            field="device",
        )
    if kind == "cuda":
        if gpus < size:
            raise InvalidRequest(
                f"tp is {size}, but torch sees {gpus} CUDA devices here: lower it, or give device cpu", field="tp"
            )
        return torch.device("cuda", rank)
    if torch._C._get_accelerator().type != "cpu":
        raise InvalidRequest(
            f"tp is {size} on the CPU, but this torch ({torch.__version__}) is built for GPUs, where transformers splits models over "
            "GPUs only: use a CPU build of torch, or tp 1",
            field="tp",
        )
    return torch.device("cpu")
