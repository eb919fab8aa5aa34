"""Tiny random models of any type transformers knows."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tests import tiny
from transformers import CONFIG_MAPPING


def small(kind: str, **changes: Any) -> Any:
    """A tiny configuration of any model type."""
    sizes = dict(tiny._BASE, num_experts=4, num_local_experts=4, n_routed_experts=4)
    sizes.update(num_experts_per_tok=2, moe_intermediate_size=48, **changes)
    return CONFIG_MAPPING[kind](**sizes)


def random_model(config: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
        with torch.no_grad():
            for parameter in module.parameters():
                noise = torch.randn_like(parameter)
                parameter.copy_(noise * 0.15) if parameter.dim() >= 2 else parameter.add_(noise * 0.1)
    module.tie_weights()
    return module.eval()
