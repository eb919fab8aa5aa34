"""Linear layers over packed weights, swapped into an unpatched transformers decoder.

torch's CPU kernels are built for many rows, and decoding has few. A packed linear reads each weight once per step however
many sequences decode, and that reading is what a decode step costs. The checkpoint's own modules remain the reference
that packed ones are tested against.
"""

from __future__ import annotations

import logging
from typing import Any, Protocol, cast

import psutil
import torch
from torch import Tensor, nn

from headrace.core.errors import InvalidRequest
from headrace.models.fused import quantise
from headrace.models.fused.modules import fuse
from headrace.models.fused.pinned import Pinned
from headrace.native import build
from headrace.native.memory import Arena
from headrace.native.skinny import QUANTISED, PackedMatrix, Storage, isa

log = logging.getLogger(__name__)

MODES = ("auto", "module", "native")


class Model(Protocol):
    """What :func:`choose_linears` needs of a loaded model."""

    @property
    def module(self) -> Any:
        """The transformers module."""


class PackedLinear(Pinned):
    """``nn.Linear`` for inference in float32 on the CPU, over a :class:`PackedMatrix`.

    Weights are frozen: there is no backward pass and no move to another device or dtype. ``state_dict()`` is that of the
    linear it replaces.
    """

    def __init__(self, matrix: PackedMatrix, *, bias: Tensor | None = None) -> None:
        super().__init__()
        self.matrix = matrix
        self.in_features, self.out_features = matrix.depth, matrix.columns
        self.register_buffer("bias", None if bias is None else bias.detach().clone(), persistent=False)

    @classmethod
    def of(cls, linear: nn.Linear, storage: Storage = "auto", arena: Arena | None = None) -> PackedLinear:
        """Pack a copy of ``linear``'s weights."""
        bias = linear.bias
        return cls(PackedMatrix(linear.weight, bias, storage, arena), bias=bias)

    @property
    def weight(self) -> Tensor:
        """float32[out_features, in_features], unpacked afresh at every access: for looking at, too slow for computing with."""
        return self.matrix.unpack()

    def forward(self, x: Tensor) -> Tensor:
        """float32[..., out_features] of float32[..., in_features]."""
        if x.dim() == 2:
            return self.matrix.matmul(x)
        return self.matrix.matmul(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """As ``nn.Linear`` prints, with the storage."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, storage={self.matrix.storage}"
        )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias


def use_native_linears(module: nn.Module, *, storage: Storage = "auto", arena: Arena | None = None) -> int:
    """Replace every plain float32 ``nn.Linear`` under ``module`` by a :class:`PackedLinear` and free its weights.

    Left alone: experts held as three-dimensional parameters, subclasses of ``nn.Linear``, and linears with hooks. Goes one
    at a time, so that memory peaks a single matrix above what the model takes. A head tied to the embedding is packed
    as a copy, because the embedding stays; where memory has no room for the copy, the head is left as it is.

    Returns:
        How many were replaced.

    Raises:
        NativeUnavailable: when the kernels cannot be compiled here.
    """
    arena = Arena() if arena is None else arena
    kept = {id(p) for child in module.modules() if not _replaceable(child) for p in child.parameters(recurse=False)}
    packed: dict[int, PackedLinear] = {}
    held = doubled = 0
    for path in [path for path, child in module.named_modules(remove_duplicate=False) if _replaceable(child)]:
        linear = module.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        weight, tied = linear.weight, id(linear.weight) in kept
        if tied and not _room_for(weight.nbytes):
            log.warning("%s shares its weights with an embedding, and memory has no room for a packed copy", path)
            continue
        if id(linear) not in packed:
            packed[id(linear)] = PackedLinear.of(linear, storage, arena)
            held += packed[id(linear)].matrix.nbytes
            doubled += packed[id(linear)].matrix.nbytes if tied else 0
        module.set_submodule(path, packed[id(linear)])
        del linear, weight
    log.info("packed %d linears into %.1f MB for %s", len(packed), held / 1e6, isa())
    if doubled:
        log.info("%.1f MB of them are a second copy of weights tied to the embedding", doubled / 1e6)
    return len(packed)


def choose_linears(model: Model, mode: str = "auto", quantize: str | None = None) -> str:
    """Give ``model`` the linear layers that ``mode`` asks for, in place, fused with what stands between them where possible.

    Args:
        model: whose ``module`` to change.
        mode: "module" keeps the checkpoint's own; "native" packs them; "auto" packs where a compiler is present and the linears are
            float32 on the CPU.
        quantize: None, or what to round weights to ("int8", "nf4"; see :mod:`headrace.models.fused.quantise`). Memory peaks at the
            checkpoint's weights and the rounded ones.

    Returns:
        "native" or "module".

    Raises:
        InvalidRequest: for another mode, or for "native" where it is impossible, or for a ``quantize`` that is, with the reason.
        UnsupportedModel: there is nothing to quantise.
    """
    quantise.check_method(quantize)
    if quantize is not None:
        quantise.check_model(model.module, quantize)
    if quantize is not None and quantize not in QUANTISED:
        mode = "module"  # no kernel packs that
    chosen = _choose(model, mode, cast(Storage | None, quantize))
    if quantize is not None:
        _quantise(model.module, chosen, quantize)
    return chosen


def _choose(model: Model, mode: str, rounding: Storage | None) -> str:
    if mode not in MODES:
        raise InvalidRequest(f"linears is {mode!r}: give one of {', '.join(MODES)}", field="linears")
    if mode == "module":
        return "module"
    reason = _obstacle(model.module)
    if reason:
        if mode == "native":
            raise InvalidRequest(f"linears is 'native', but {reason}", field="linears")
        log.info("keeping the checkpoint's own linears: %s", reason)
        return "module"
    arena = Arena()
    if rounding is None:
        fuse(model.module, arena=arena)
    else:  # each part is compared exactly and then rounded, so that no more than one stands there in floats
        rounded = Arena()
        fuse(model.module, arena=arena, finish=lambda part: quantise.round_packed(part, rounding, rounded))
    use_native_linears(model.module, arena=arena)
    return "native"


def _quantise(module: nn.Module, chosen: str, method: str) -> None:
    if chosen == "native":
        done = quantise.round_packed(module, cast(Storage, method))
    else:
        done = quantise.round_linears(module, method)
    log.info("rounded the weights of %d matrices to %s (%s)", done, method, chosen)


def _obstacle(module: nn.Module) -> str:
    """Why the linears of ``module`` cannot be packed; empty when they can."""
    linears = [child for child in module.modules() if type(child) is nn.Linear]
    odd = next((child.weight for child in linears if not _packable(child.weight)), None)
    if odd is not None:
        return f"the model is {str(odd.dtype).removeprefix('torch.')} on {odd.device}, and packed linears are float32 on the CPU"
    if not any(_replaceable(child) for child in linears):
        return "the model has no plain linear layers"
    return build.why_not()


def _packable(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype is torch.float32


def _replaceable(module: nn.Module) -> bool:
    """A linear whose forward is nothing but ``x @ W.T + b``: no subclass, no hooks, no computed weights."""
    if type(module) is not nn.Linear or not _packable(module.weight):
        return False
    return not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _room_for(nbytes: int) -> bool:
    """Whether ``nbytes`` more leave at least half of the free memory free."""
    available: int = psutil.virtual_memory().available
    return nbytes <= available // 2
