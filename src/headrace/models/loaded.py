"""A model in memory, however it got there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from headrace.core.protocols import ModelCard


@dataclass(slots=True)
class LoadedModel:
    """A model ready to run.

    Attributes:
        module: the ``*ForCausalLM`` in evaluation mode.
        config: its configuration; of a multi-modal checkpoint the text part's.
        path: the checkpoint's folder.
        card: what faces need to know.
        dtype: of the weights, and of K and V.
        device: where the weights are.
    """

    module: Any
    config: Any
    path: Path
    card: ModelCard
    dtype: torch.dtype
    device: torch.device
