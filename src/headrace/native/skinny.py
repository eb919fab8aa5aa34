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

Storage = Literal["auto", "float32", "bfloat16", "int8", "nf4"]

QUANTISED: tuple[Storage, ...] = ("int8", "nf4")
"""Storages that round the weights."""

MAX_INT8_DEPTH = 1 << 17
"""Beyond it a sum of products of bytes could leave 32 bits."""

_CODES: dict[Storage, int] = {"float32": 0, "bfloat16": 1, "int8": 2, "nf4": 3}


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
        ("panel_bytes", number, (number, number, number)),
        ("byte_stride", number, (number,)),
        ("is_bfloat16", threads, (pointer, number, threads)),
        ("pack", None, (pointer, pointer, threads)),
        ("unpack", None, (pointer, pointer, threads)),
        ("matmul", None, (pointer, pointer, number, number, pointer, threads)),
        ("quantise", None, (pointer, number, number, number, pointer, pointer)),
        ("has_tiles", threads, ()),
        ("int8_matmul", None, (pointer, pointer, pointer, number, pointer, threads)),
    ):
        function = getattr(library, f"headrace_{name}")
        function.restype, function.argtypes = result, list(arguments)
    return library


def isa() -> str:
    """The instruction set the kernels were compiled for: "avx512", "avx2" or "generic"."""
    return str(_library().headrace_isa().decode())


def has_tiles() -> bool:
    """Whether products of int8 matrices with several rows go through the processor's matrix tiles (AMX)."""
    return bool(_library().headrace_has_tiles())


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as bytes with one scale each, as int8 products take them.

    Args:
        x: float32[M, K] on the CPU with contiguous columns.

    Returns:
        uint8[M, K rounded up to 64] holding ``round(x / scale) + 128``, 128 beyond K, and the scales, float32[M]:
        a row's largest magnitude / 127, or NaN for a row that is not finite.
    """
    library = _library()
    rows, depth = x.shape
    levels = torch.empty(rows, library.headrace_byte_stride(depth), dtype=torch.uint8)
    scales = torch.empty(rows)
    library.headrace_quantise(x.data_ptr(), x.stride(0), rows, depth, levels.data_ptr(), scales.data_ptr())
    return levels, scales


class PackedMatrix:
    """A weight matrix W [N, K] and bias [N], laid out for ``x @ W.T + bias`` in float32.

    Every row of a product is summed in one fixed order, so its bits depend neither on the other rows nor on the number of threads.
    Calls use ``torch.get_num_threads()`` threads of torch's own OpenMP pool.

    Args:
        weight: float32[N, K] on the CPU; copied.
        bias: float32[N] or None; copied.
        storage: "float32"; "bfloat16", half the bytes, only for values that are exactly bfloat16; "auto", the smallest exact one;
            "int8", a quarter of the bytes, weights rounded to 127 steps of one scale per output, rows of x to 127 steps of
            one scale per row, summed exactly, and a row of x that holds a NaN or an infinity gives NaNs; "nf4", 4.25 bits
            a weight: the 16 NormalFloat-4 levels times a bfloat16 scale per 64 inputs, computed with in float32.
        arena: where the packed weights go; by default a place of their own.

    Raises:
        NativeUnavailable: when the kernels cannot be compiled here.
        ValueError: for another device or dtype, wrong shapes, "bfloat16" where it would round, a quantised storage for
            weights that are not finite, or "int8" for more than MAX_INT8_DEPTH inputs.
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
        self.storage = _choose(library, weight, storage, threads)
        self.columns, self.depth = weight.shape
        panel = library.headrace_panel()
        padded = -(-self.columns // panel) * panel
        self._bias = torch.zeros(padded)
        if bias is not None:
            self._bias[: self.columns] = bias.detach()
        self._scales, self._compensation = torch.empty(0), torch.empty(0, dtype=torch.int32)
        if self.storage == "int8":
            self._scales, self._compensation = torch.empty(padded), torch.empty(padded, dtype=torch.int32)
        nbytes = library.headrace_panel_bytes(self.columns, self.depth, _CODES[self.storage])
        self._panels = (Arena(nbytes) if arena is None else arena).take(nbytes)
        parts = (self._panels, self._bias, self._scales, self._compensation)
        self._matrix = _Matrix(*(part.data_ptr() for part in parts), self.columns, self.depth, _CODES[self.storage])
        self._address = ctypes.addressof(self._matrix)
        self._matmul = library.headrace_matmul
        library.headrace_pack(self._address, weight.data_ptr(), threads)

    @property
    def address(self) -> int:
        """Of the ``struct Matrix`` in memory, for native code that multiplies by itself; valid while this object lives."""
        return self._address

    @property
    def scales(self) -> Tensor:
        """float32[N], what the levels of an int8 column are multiplied by; empty for other storages."""
        return self._scales[: self.columns]

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return sum(part.nbytes for part in (self._panels, self._bias, self._scales, self._compensation))

    def unpack(self) -> Tensor:
        """A fresh float32[N, K]: bit for bit what was packed, or what it was rounded to."""
        weight = torch.empty(self.columns, self.depth)
        self._library.headrace_unpack(self._address, weight.data_ptr(), torch.get_num_threads())
        return weight

    def stored_as(self, storage: Storage, arena: Arena | None = None) -> PackedMatrix:
        """The same weights and bias packed anew; raises as the constructor."""
        return PackedMatrix(self.unpack(), self._bias[: self.columns], storage, arena)

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


def _choose(library: ctypes.CDLL, weight: Tensor, storage: Storage, threads: int) -> Storage:
    """The storage to use; raises ValueError where these weights cannot have it."""
    if storage in ("auto", "bfloat16"):
        exact = library.headrace_is_bfloat16(weight.data_ptr(), weight.numel(), threads)
        if storage == "bfloat16" and not exact:
            raise ValueError("these weights are not exactly bfloat16: pack them as float32")
        return "bfloat16" if exact else "float32"
    if storage not in _CODES:
        raise ValueError(f"storage is {storage!r}: give one of auto, {', '.join(_CODES)}")
    if storage == "int8" and weight.shape[1] > MAX_INT8_DEPTH:
        raise ValueError(
            f"int8 takes at most {MAX_INT8_DEPTH} inputs, and these weights have {weight.shape[1]}: use float32"
        )
    if storage in QUANTISED and not bool(weight.isfinite().all()):
        raise ValueError(f"{storage} takes finite weights, and some are NaN or infinite: pack them as float32")
    return storage
