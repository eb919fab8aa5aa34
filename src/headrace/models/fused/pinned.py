"""Modules that live as float32 on the CPU and nowhere else."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import nn


class Pinned(nn.Module):
    """Base of modules over packed weights: to move or convert one is an error that says what to do instead."""

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        probe = fn(torch.zeros(1))
        if probe.device.type != "cpu" or probe.dtype is not torch.float32:
            raise TypeError(
                f"packed weights stay float32 on the CPU, and {probe.dtype} on {probe.device} was asked for: "
                "load the model again with linears='module'"
            )
        return self
