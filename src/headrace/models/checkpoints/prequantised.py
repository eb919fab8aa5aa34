"""Checkpoints whose maker has quantised them: AWQ, GPTQ, FP8, MXFP4, compressed-tensors, bitsandbytes, ...

transformers has a loader for each, with its own needs of packages and devices; those are asked here before any weight is read, so
that a refusal comes at once and says what is missing. Where the format has no kernels on the CPU but transformers can widen it, the
weights are widened to the model's dtype while they load: such a model runs like any other, and may be rounded again to
what runs fast here.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

from headrace.core.errors import UnsupportedModel
from headrace.models.fused.quantise import METHODS, method_of

WIDENED_ON_CPU = frozenset({"fp8", "mxfp4", "compressed-tensors"})
_PACKAGES = {
    "aqlm": "aqlm",
    "auto-round": "auto-round",
    "awq": "gptqmodel",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "fbgemm_fp8": "kernels",
    "fp8": "accelerate",
    "gptq": "gptqmodel optimum",
    "hqq": "hqq",
    "mxfp4": "accelerate",
    "quanto": "optimum-quanto",
    "quark": "amd-quark",
    "torchao": "torchao",
    "vptq": "vptq",
}


@dataclass(frozen=True, slots=True)
class Stored:
    """How a checkpoint was quantised.

    Attributes:
        method: by transformers' name, such as "awq".
        widened: it becomes an ordinary model of the dtype asked for; else its modules are the method's own.
    """

    method: str
    widened: bool

    def options(self, device: torch.device) -> dict[str, Any]:
        """More arguments for ``from_pretrained``."""
        return {} if self.widened else {"device_map": {"": device}}


def settle(name: str, whole: Any, config: Any, device: torch.device, *, alone: bool = True) -> Stored | None:
    """Find out how a checkpoint was quantised and have its configuration say how to load it; None for ordinary ones.

    Args:
        name: for messages.
        whole: the checkpoint's configuration.
        config: the part of it that is loaded; its ``quantization_config`` is set here.
        alone: no other ranks share the model.

    Raises:
        UnsupportedModel: its loader does not run here, with what is missing and what to do.
    """
    settings = getattr(whole, "quantization_config", None) or getattr(config, "quantization_config", None)
    if not settings:
        return None
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    method = method_of(settings)
    if not alone:
        raise UnsupportedModel(
            f"{name} is quantised with {method}, and ranks share only plain weights: use tp 1, or the unquantised checkpoint",
            field="tp",
        )
    widened = device.type == "cpu" and method in WIDENED_ON_CPU
    config.quantization_config = {**settings, "dequantize": True} if widened else settings
    problem = _problem(config.quantization_config, device)
    if problem:
        raise UnsupportedModel(
            f"{name} is quantised with {method}, which does not run on {device} here: {problem}. {_remedy(method)}",
            field="model",
        )
    return Stored(method, widened)


def release(module: Any, stored: Stored | None) -> None:
    """Let a widened model be an ordinary one, which may be quantised anew."""
    if stored is None or not stored.widened:
        return
    for settings in {id(c): c for c in (module.config, module.config.get_text_config())}.values():
        if hasattr(settings, "quantization_config"):
            del settings.quantization_config


def _problem(settings: dict[str, Any], device: torch.device) -> str:
    """Why transformers' loader cannot run here; empty when it can."""
    from transformers.quantizers.auto import AutoHfQuantizer

    try:
        loaders: Any = AutoHfQuantizer
        if not loaders.supports_quant_method(settings):
            return "this transformers does not know the method"
        quantizer = loaders.from_config(copy.deepcopy(settings), pre_quantized=True)
        quantizer.validate_environment(device_map={"": str(device)}, weights_only=True)
    except Exception as error:  # each method's loader has its own ways, and packages it imports theirs
        lines = str(error).strip().splitlines()
        return (lines[0] if lines else type(error).__name__).rstrip(".")
    return ""


def _remedy(method: str) -> str:
    package = _PACKAGES.get(method)
    install = f"Install what it needs (pip install {package}), or give" if package else "Give"
    return f"{install} the unquantised checkpoint, which headrace can round while loading (quantize {' or '.join(METHODS)})"
