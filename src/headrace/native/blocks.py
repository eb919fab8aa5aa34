"""The operations between matrix products: the Python side of ``src/blocks.cpp``.

All take and give float32 on the CPU, and compute each row by itself in one fixed order. Callers see to dtypes and shapes when
they are built; these run in every layer of every step.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Literal

import torch
from torch import Tensor

from headrace.native import build

Activation = Literal["silu", "gelu_tanh", "gelu", "relu", "relu_squared"]

ACTIVATIONS: dict[Activation, int] = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu": 3, "relu_squared": 4}


@functools.cache
def _library() -> ctypes.CDLL:
    library = build.load()
    pointer, number, threads, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
    for name, arguments in (
        ("rms_norm", (pointer, number, number, number, number, pointer, real, pointer, number, threads)),
        ("gate", (pointer, number, number, threads, threads, pointer, threads)),
        ("rotate", (pointer, number, number, number, number, number, threads, pointer, pointer, threads)),
    ):
        function = getattr(library, f"headrace_{name}")
        function.restype, function.argtypes = None, list(arguments)
    return library


def refuse_gradients(x: Tensor) -> None:
    """Raise RuntimeError where autograd would want a gradient through a kernel: it would silently get none."""
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            "native kernels have no backward pass: load with linears='module' what is to be differentiated"
        )


def rms_norm(x: Tensor, scale: Tensor, epsilon: float) -> Tensor:
    """``x / sqrt(mean(x**2) + epsilon) * scale`` over the last dimension.

    Args:
        x: float32[..., W].
        scale: float32[W], contiguous.

    Returns:
        float32[..., W], contiguous.
    """
    refuse_gradients(x)
    x = x.contiguous()
    y, width = torch.empty_like(x), scale.shape[0]
    _library().headrace_rms_norm(
        x.data_ptr(),
        width,
        x.numel() // width,
        1,
        width,
        scale.data_ptr(),
        epsilon,
        y.data_ptr(),
        width,
        torch.get_num_threads(),
    )
    return y


def rms_norm_(x: Tensor, scale: Tensor, epsilon: float) -> None:
    """As :func:`rms_norm`, in place, over runs of W in every row.

    Args:
        x: float32[R, G * W] with contiguous columns.
        scale: float32[W], contiguous, shared by the G runs.
    """
    width, stride = scale.shape[0], x.stride(0)
    _library().headrace_rms_norm(
        x.data_ptr(), stride, x.shape[0], x.shape[1] // width, width, scale.data_ptr(), epsilon, x.data_ptr(), stride,
        torch.get_num_threads(),
    )  # fmt: skip


def gate(x: Tensor, activation: Activation, *, gated: bool = True) -> Tensor:
    """``activation(x[:, :I]) * x[:, I:]``: float32[R, I] of float32[R, 2 * I], contiguous; not ``gated``, ``activation(x)``."""
    rows, width = x.shape[0], x.shape[1] // (2 if gated else 1)
    y = torch.empty(rows, width)
    _library().headrace_gate(
        x.data_ptr(), rows, width, ACTIVATIONS[activation], gated, y.data_ptr(), torch.get_num_threads()
    )
    return y


def rotate_(x: Tensor, size: int, cosines: Tensor, sines: Tensor, *, interleaved: bool = False) -> None:
    """Turn the first T dimensions of every head by its row's angles, in place.

    Args:
        x: float32[R, H * size] with contiguous columns.
        size: of a head.
        cosines, sines: float32[R, T], contiguous, T at most ``size``.
        interleaved: pair dimension 2i with 2i + 1, by angle i; otherwise i with i + T / 2.
    """
    _library().headrace_rotate(
        x.data_ptr(), x.stride(0), x.shape[0], x.shape[1] // size, size, cosines.shape[1], interleaved,
        cosines.data_ptr(), sines.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
