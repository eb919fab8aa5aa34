"""Loading one rank's part of a model by transformers' own tensor-parallel plan."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from headrace.models.parallel import group as groups
from headrace.models.parallel import layers, plan
from headrace.models.parallel.group import Group


@dataclass(frozen=True, slots=True)
class Sharing:
    """How a model is shared out, found before its weights are read.

    Attributes:
        config: the whole model's configuration.
        plan: transformers' plan, see :func:`headrace.models.parallel.plan.plan_of`.
        group, device: this rank's.
    """

    config: Any
    plan: dict[str, str]
    group: Group
    device: torch.device

    @classmethod
    def of(
        cls, name: str, kind: Any, config: Any, shapes: dict[str, tuple[int, ...]], group: Group, device: torch.device
    ) -> Sharing:
        """The sharing of class ``kind`` under ``config``, with parameters of ``shapes``.

        Raises:
            UnsupportedModel: transformers has no plan for it.
            InvalidRequest: the ranks cannot share it evenly.
        """
        found = plan.plan_of(kind, config)
        plan.check(name, config, found, shapes, group.size)
        return cls(config, found, group, device)

    @property
    def parts(self) -> int:
        """By how many a device's memory for weights is relieved: ranks on one CPU share the memory too."""
        return self.group.size if self.device.type == "cuda" else 1

    def environment(self) -> AbstractContextManager[None]:
        """What must hold while transformers loads."""
        return groups.environment(self.group, self.device)

    def options(self) -> dict[str, Any]:
        """Further arguments for ``from_pretrained``."""
        from transformers.distributed.configuration_utils import DistributedConfig

        return {"distributed_config": DistributedConfig(tp_size=self.group.size)}

    def settle(self, module: Any) -> Any:
        """Make plain layers of what was loaded, in place; returns the configuration as this rank sees it."""
        layers.settle(module, self.plan, self.group)
        return plan.local_config(self.config, self.plan, self.group.size)
