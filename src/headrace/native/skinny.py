"""Weights packed for products with few rows: the Python side of ``src/product.cpp``."""

from __future__ import annotations

import ctypes
import functools
from typing import Literal

import torch
from torch import Tensor

from headrace.native import build
from headrace.native.blocks import refuse_gradients
from headrace.native.memory import Arena

Storage = Literal["auto", "float32", "bfloat16"]

_CODES = {torch.float32: 0, torch.bfloat16: 1}


class _Matrix(ctypes.Structure):
    """``struct Matrix`` of ``product.h``."""

    _fields_ = (
        ("panels", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("compensation", ctypes.c_void_p),
        ("columns", ctypes.c_int64),
        ("depth", ctypes.c_int64),
        ("storage", ctypes.c_int64),
    )


@functools.cache
def _library() -> ctypes.CDLL:
    return bind(build.load())


def bind(library: ctypes.CDLL) -> ctypes.CDLL:
    """Declare the C functions of ``product.cpp`` in ``library``, and give it back."""
    pointer, number, threads = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    for name, result, arguments in (
        ("isa", ctypes.c_char_p, ()),
        ("panel", number, ()),
        ("is_bfloat16", threads, (pointer, number, threads)),
        ("pack", None, (pointer, pointer, threads)),
        ("unpack", None, (pointer, pointer, threads)),
        ("matmul", None, (pointer, pointer, number, number, pointer, threads)),
    ):
        function = getattr(library, f"headrace_{name}")
        function.restype, function.argtypes = result, list(arguments)
    return library


def isa() -> str:
    """The instruction set the kernels were compiled for: "avx512", "avx2" or "generic"."""
    return str(_library().headrace_isa().decode())


class PackedMatrix:
    """A weight matrix W [N, K] and bias [N], laid out for ``x @ W.T + bias`` in float32.

    Every row of a product is summed in one fixed order, so its bits depend neither on the other rows nor on the number of threads.
    Calls use ``torch.get_num_threads()`` threads of torch's own OpenMP pool.

    Args:
        weight: float32[N, K] on the CPU; copied.
        bias: float32[N] or None; copied.
        storage: "float32", "bfloat16" (half the bytes, only for values that are exactly bfloat16) or "auto", the smallest exact one.
        arena: where the packed weights go; by default a place of their own.

    Raises:
        NativeUnavailable: when the kernels cannot be compiled here.
        ValueError: for another device or dtype, wrong shapes, or "bfloat16" where it would round.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, storage: Storage = "auto", arena: Arena | None = None
    ) -> None:
        library = self._library = _library()
        if weight.dim() != 2 or weight.dtype is not torch.float32 or weight.device.type != "cpu":
            raise ValueError(
                f"a packed matrix is float32[N, K] on the CPU, not {weight.dtype} {list(weight.shape)} on {weight.device}"
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"a bias of {weight.shape[0]} values is needed, not {list(bias.shape)}")
        weight, threads = weight.detach().contiguous(), torch.get_num_threads()
        self.dtype = torch.float32
        if storage != "float32":
            if library.headrace_is_bfloat16(weight.data_ptr(), weight.numel(), threads):
                self.dtype = torch.bfloat16
            elif storage == "bfloat16":
                raise ValueError("these weights are not exactly bfloat16: pack them as float32")
        self.columns, self.depth = weight.shape
        panel = library.headrace_panel()
        padded = -(-self.columns // panel) * panel
        self._bias = torch.zeros(padded)
        if bias is not None:
            self._bias[: self.columns] = bias.detach()
        nbytes = padded * self.depth * self.dtype.itemsize
        self._panels = (Arena(nbytes) if arena is None else arena).take(nbytes)
        self._matrix = _Matrix(
            self._panels.data_ptr(), self._bias.data_ptr(), None, None, self.columns, self.depth, _CODES[self.dtype]
        )
        self._address = ctypes.addressof(self._matrix)
        self._matmul = library.headrace_matmul
        library.headrace_pack(self._address, weight.data_ptr(), threads)

    @property
    def address(self) -> int:
        """Of the ``struct Matrix`` in memory, for native code that multiplies by itself; valid while this object lives."""
        return self._address

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return self._panels.nbytes + self._bias.nbytes

    def unpack(self) -> Tensor:
        """A fresh float32[N, K], bit for bit what was packed."""
        weight = torch.empty(self.columns, self.depth)
        self._library.headrace_unpack(self._address, weight.data_ptr(), torch.get_num_threads())
        return weight

    def matmul(self, x: Tensor) -> Tensor:
        """``x @ W.T + bias``.

        Args:
            x: float32[M, K] on the CPU; rows may be strided, M may be 0.

        Returns:
            float32[M, N].

        Raises:
            ValueError: for another shape, dtype or device.
            RuntimeError: where a gradient is wanted, because there is none.
        """
        if x.dim() != 2 or x.shape[1] != self.depth or x.dtype is not torch.float32 or x.device.type != "cpu":
            raise ValueError(
                f"float32[M, {self.depth}] on the CPU is needed, not {x.dtype} {list(x.shape)} on {x.device}"
            )
        refuse_gradients(x)
        if x.stride(1) != 1:
            x = x.contiguous()
        rows = x.shape[0]
        y = torch.empty(rows, self.columns)
        if rows:
            self._matmul(self._address, x.data_ptr(), x.stride(0), rows, y.data_ptr(), torch.get_num_threads())
        return y
