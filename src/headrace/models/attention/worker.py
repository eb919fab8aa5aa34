"""The entry point of the CPU kernel: a C function of one argument, so that any thread can run it without the interpreter."""

# Intrinsics are called without the typing context that numba passes them, which type checkers cannot know, and numba marks few exports.
# mypy: disable-error-code="attr-defined, call-arg, var-annotated, no-untyped-call"

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from numba import carray, cfunc, njit, types

from headrace.models.attention import kernel, numerics, tiles
from headrace.models.attention.kernel import work
from headrace.models.attention.numerics import codes_at, floats_at, halves_at, ints_at, longs_at

# The argument block of a worker holds int64, addresses first:
#   0 counter of tasks, behind it the counter of threads   1 q   2 k   3 v   4 out   5 sinks   6 positions   7 query_starts
#   8 context_starts   9 keys   10 mask_starts   11 mask_words   12 tiles   13 partial   14 done   15 scale and soft cap (0: none)
# and then numbers:
#   16 rows   17 query heads   18 slots   19 heads   20 dim   21 value dim   22 segments   23 keys   24 sinks   25 mask words
#   26 tiles   27 parts   28 packed queries of a part   29 window   30 address of the scratch memory
# and for int8 planes
#   31 scales of k   32 scales of v   33 slots that have them (0 for other planes)
FIELDS = 34


@njit
def _start(a: Any, k: Any, v: Any) -> None:
    """Wrap the arrays of argument block ``a`` and work."""
    numbers = carray(floats_at(a[15]), 2)
    rows, query_heads, heads, dim, value_dim, segments = a[16], a[17], a[19], a[20], a[21], a[22]
    work(
        longs_at(a[0]),
        a[0] + 8,
        a[30],
        carray(floats_at(a[1]), (rows, query_heads, dim)),
        k,
        v,
        carray(floats_at(a[31]), (a[33], heads)),
        carray(floats_at(a[32]), (a[33], heads)),
        carray(floats_at(a[4]), (rows, query_heads, value_dim)),
        carray(floats_at(a[5]), a[24]),
        carray(ints_at(a[6]), rows),
        carray(ints_at(a[7]), segments + 1),
        carray(ints_at(a[8]), segments + 1),
        carray(ints_at(a[9]), a[23]),
        carray(ints_at(a[10]), segments + 1),
        carray(ints_at(a[11]), a[25]),
        carray(ints_at(a[12]), (a[26], 8)),
        carray(floats_at(a[13]), (heads, a[27], a[28], value_dim + 2)),
        carray(longs_at(a[14]), (heads, a[27])),
        a[29],
        numbers[0],
        numbers[1],
    )


_BLOCK_POINTER = types.void(types.CPointer(types.int64))


def compile_worker(storage: str, *, cache: bool) -> Any:
    """The worker for planes of "float32", "bfloat16" or "int8": a C function of a pointer to an argument block, at ``.address``."""
    # Numba's cache knows a function by its own file and by what it encloses; the other files come in as the latter.
    sources = _digest()
    if storage == "float32":

        def worker(block: Any) -> None:
            _ = sources
            a = carray(block, FIELDS)
            _start(a, carray(floats_at(a[2]), (a[18], a[19], a[20])), carray(floats_at(a[3]), (a[18], a[19], a[21])))

    elif storage == "int8":

        def worker(block: Any) -> None:
            _ = sources
            a = carray(block, FIELDS)
            _start(a, carray(codes_at(a[2]), (a[18], a[19], a[20])), carray(codes_at(a[3]), (a[18], a[19], a[21])))

    else:

        def worker(block: Any) -> None:
            _ = sources
            a = carray(block, FIELDS)
            _start(a, carray(halves_at(a[2]), (a[18], a[19], a[20])), carray(halves_at(a[3]), (a[18], a[19], a[21])))

    return cfunc(_BLOCK_POINTER, cache=cache)(worker)


def _digest() -> int:
    """A number that changes with the files this one is compiled from."""
    text = b"".join(Path(str(module.__file__)).read_bytes() for module in (kernel, numerics, tiles))
    return int.from_bytes(hashlib.sha256(text).digest()[:4], "little")
