# Intrinsics are called without the typing context that numba passes them, which type checkers cannot know, and numba marks few exports.
# mypy: disable-error-code="attr-defined, call-arg, var-annotated, no-untyped-call"
"""What the CPU kernel needs beyond plain Python: pointers, atomics, bfloat16, and an exponential that vectorises."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

ZERO, ONE, TWO, HALF = np.float32(0), np.float32(1), np.float32(2), np.float32(0.5)
_LEAST = np.float32(-87.0)
_LOG2E, _LN2 = np.float32(1.4426950408889634), np.float32(0.6931471805599453)
# Minimax coefficients of (exp(x) - 1 - x) / x**2 on [-ln 2 / 2, ln 2 / 2], from the Cephes library's expf.
_EXP = tuple(
    np.float32(c)
    for c in (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
)


@intrinsic
def as_float(typingctx: Any, value: Any) -> Any:
    """float32 of a stored element: itself, an int8 code, or a bfloat16 given by its bits (uint16)."""
    stored = value if isinstance(value, types.Integer) else types.float32

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if stored == types.float32:
            return args[0]
        if stored == types.int8:
            return builder.sitofp(args[0], ir.FloatType())
        word = ir.IntType(32)
        return builder.bitcast(builder.shl(builder.zext(args[0], word), ir.Constant(word, 16)), ir.FloatType())

    return types.float32(stored), generate


@intrinsic
def _power_of_two(typingctx: Any, exponent: Any) -> Any:
    """2**exponent as float32, for int32 exponents of normal numbers."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(32)
        biased = builder.add(args[0], ir.Constant(word, 127))
        return builder.bitcast(builder.shl(biased, ir.Constant(word, 23)), ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic
def fetch_add(typingctx: Any, pointer: Any, amount: Any) -> Any:
    """Atomically add to the int64 at ``pointer``; returns what was there."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", args[0], args[1], "seq_cst")

    return types.int64(types.CPointer(types.int64), types.int64), generate


def _pointer_of(element: Any) -> Any:
    """An intrinsic that makes an address a pointer to ``element``."""

    @intrinsic
    def pointer(typingctx: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(element)(types.int64), generate

    return pointer


floats_at, halves_at, codes_at, ints_at, longs_at = (
    _pointer_of(t) for t in (types.float32, types.uint16, types.int8, types.int32, types.int64)
)


@njit(fastmath=True, inline="always")
def exp(x: Any) -> Any:
    """exp of a float32 that is not positive; exactly 0 below -87. Written out so that it vectorises."""
    y = max(x, _LEAST)
    k = np.int32(y * _LOG2E - HALF)
    r = y - np.float32(k) * _LN2
    p = _EXP[0] * r + _EXP[1]
    p = p * r + _EXP[2]
    p = p * r + _EXP[3]
    p = p * r + _EXP[4]
    p = p * r + _EXP[5]
    e = (p * r * r + r + ONE) * _power_of_two(k)
    return e if x > _LEAST else ZERO
