"""Weights rounded to 8 or 4 bits while a model loads.

int8: one scale per output of a linear, 127 steps to its largest weight; the rows of activations are rounded alike, each by itself,
and products are summed as integers, so that a row's result depends on that row alone. nf4: blocks of 64 weights share a scale and take
one of 16 values spaced like a normal distribution; activations stay as they are.

On the CPU both run on the packed kernels of :mod:`headrace.native` where these can be compiled. Else int8 goes through
``torch._int_mm``, and nf4 through bitsandbytes where that is installed. Embeddings and norms keep their precision, and the LM head
stays at 8 bits under nf4: on the bundled model its last 4 bits are worth 0.012 of the 0.041 nats per token that nf4 would cost.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from headrace.core.errors import InvalidRequest, UnsupportedModel
from headrace.native.memory import Arena
from headrace.native.skinny import QUANTISED, PackedMatrix, Storage

log = logging.getLogger(__name__)

METHODS = ("int8", "nf4")
TOP = 127  # the largest code of int8
_ROWS = 32  # rows that a product of bytes takes at least on a GPU, and in multiples of 8
_LEAST = 1e-30


class Int8Linear(nn.Module):
    """A linear with int8 weights, one scale per output, and activations rounded to int8 row by row.

    Chosen among what torch has on the CPU, by measurement (2048 x 2048, 2 threads, ms at 1, 8 and 64 rows): ``torch._int_mm`` with
    the rounding around it 0.27, 0.45 and 0.93; ``_weight_int8pack_mm`` over bfloat16 activations 0.26, 0.80 and 5.5; the dynamic
    quantised linear 0.14, 0.28 and 1.1, but it has one scale for all rows, so that a sequence's tokens would depend on
    its company.

    Args:
        weight: [N, K] of any float dtype and device.
        bias: [N] or None.
    """

    codes: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        codes, scales = _rounded(weight.detach())
        scales = _fitted(codes, weight.detach(), scales)
        # As _int_mm's second operand [K, N]: N runs slowest, so each output's weights lie together.
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scales", scales, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach().float(), persistent=False)

    @property
    def weight(self) -> Tensor:
        """float32[out_features, in_features], what the codes stand for."""
        return self.codes.float() * self.scales.unsqueeze(1)

    def forward(self, x: Tensor) -> Tensor:
        """[..., out_features] of [..., in_features], of x's dtype."""
        rows = x.reshape(-1, self.in_features)
        count = rows.shape[0]
        codes, scales = _rounded(rows)
        if codes.is_cuda:
            whole = max(_ROWS, -(-count // 8) * 8)
            codes = nn.functional.pad(codes, (0, 0, 0, whole - count))
        if not count:
            return x.new_empty(*x.shape[:-1], self.out_features)
        y = torch._int_mm(codes, self.codes.t())[:count].float() * scales.unsqueeze(1) * self.scales
        if self.bias is not None:
            y += self.bias
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """As ``nn.Linear`` prints, with the storage."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, storage=int8"
        )


def round_packed(module: Any, storage: Storage, arena: Arena | None = None) -> int:
    """Repack every :class:`PackedMatrix` under ``module`` that is not rounded yet, one at a time; returns how many.

    Args:
        module: a transformers model or a part of one.
        arena: where they go.

    Raises:
        UnsupportedModel: weights that ``storage`` cannot hold.
    """
    arena, done, head = Arena() if arena is None else arena, 0, _head_modules(module)
    for child in module.modules():
        wanted: Storage = "int8" if child in head else storage
        for name, value in vars(child).items():
            if isinstance(value, PackedMatrix) and value.storage not in QUANTISED:
                try:
                    setattr(child, name, value.stored_as(wanted, arena))
                except ValueError as error:
                    raise UnsupportedModel(f"quantize is {storage!r}, but {error}", field="quantize") from error
                done += 1
            del value
    return done


def round_linears(module: Any, method: str) -> int:
    """Replace every plain ``nn.Linear`` under ``module`` by one of ``method``, for want of packed kernels; returns how many.

    Raises:
        InvalidRequest: "nf4" without bitsandbytes.
        UnsupportedModel: weights that are NaN or infinite.
    """
    replaced: dict[int, nn.Module] = {}
    head = _head_modules(module)
    for path in [path for path, _ in plain_linears(module)]:
        linear: Any = module.get_submodule(path)
        if id(linear) not in replaced:
            make = Int8Linear if method == "int8" or linear in head else _nf4_linear
            replaced[id(linear)] = made = make(linear.weight, linear.bias)
            made.train(linear.training)
        module.set_submodule(path, replaced[id(linear)])
        del linear
    return len(replaced)


def _head_modules(module: Any) -> set[nn.Module]:
    """The LM head, which nf4 leaves at 8 bits."""
    found = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
    return set() if found is None else set(found.modules())


def plain_linears(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """(path, linear) of every linear whose forward is ``x @ W.T + b`` over float weights; shared ones under every path."""
    for path, child in module.named_modules(remove_duplicate=False):
        if type(child) is nn.Linear and child.weight.is_floating_point() and child.weight.itemsize > 1:
            yield path, child


def check_method(method: str | None) -> None:
    """Raise :class:`InvalidRequest` unless ``method`` is None or one of ``METHODS``."""
    if method is not None and method not in METHODS:
        raise InvalidRequest(f"quantize is {method!r}: give one of {', '.join(METHODS)}", field="quantize")


def check_model(module: Any, method: str) -> None:
    """Raise unless rounding the weights of ``module`` makes sense.

    Raises:
        InvalidRequest: the checkpoint is quantised already.
        UnsupportedModel: there are no plain linears.
    """
    already = getattr(module.config, "quantization_config", None)
    if already is not None:
        raise InvalidRequest(
            f"quantize is {method!r}, but the checkpoint is quantised with {method_of(already)} already: leave quantize out, "
            "or give the checkpoint it was made from",
            field="quantize",
        )
    if next(plain_linears(module), None) is None:
        raise UnsupportedModel(
            f"{type(module).__name__} has no plain linear layers, so quantize={method!r} has nothing to round: leave it out",
            field="quantize",
        )


def method_of(settings: Any) -> str:
    """The name in a checkpoint's quantisation settings, a mapping or transformers' object: "awq", "gptq", "fp8", ..."""
    found = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    return str(getattr(found, "value", found) or "an unnamed method")


def _rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """int8[R, K] codes and float32[R] scales of rows, each by itself; a row with a NaN or an infinity gets such a scale."""
    rows = rows.float()
    largest = rows.abs().amax(1) if rows.shape[0] else rows.new_empty(0)
    inverse = TOP / largest.clamp_min(_LEAST)
    return (rows * inverse.unsqueeze(1)).round_().to(torch.int8), largest / TOP


def _fitted(codes: Tensor, rows: Tensor, scales: Tensor) -> Tensor:
    """The scale per row with which its codes come closest to it in the mean square; ``scales`` where all codes are 0."""
    numbers = codes.float()
    length = (numbers * numbers).sum(1)
    return torch.where(length > 0, (numbers * rows.float()).sum(1) / length.clamp_min(1), scales)


def _nf4_linear(weight: Tensor, bias: Tensor | None) -> nn.Module:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InvalidRequest(
            "quantize is 'nf4', which needs headrace's own kernels (a C++ compiler, float32 on the CPU) or bitsandbytes, and there is "
            "neither: pip install bitsandbytes, or use int8",
            field="quantize",
        )
    import bitsandbytes as untyped

    bitsandbytes: Any = untyped
    linear = bitsandbytes.nn.Linear4bit(
        weight.shape[1], weight.shape[0], bias=bias is not None, compute_dtype=weight.dtype, quant_type="nf4"
    )
    linear.weight = bitsandbytes.nn.Params4bit(weight.detach().cpu(), requires_grad=False, quant_type="nf4")
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    moved: nn.Module = linear.to(weight.device)
    return moved
