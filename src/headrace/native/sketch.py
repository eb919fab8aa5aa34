"""Decode attention over a product-quantised sketch: the Python side of ``src/sketch.cpp``; ``src/sketch.h`` says what the structs mean.

Structs hold addresses and keep nothing alive: whoever fills them holds on to the memory behind.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_float, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from headrace.native import build

STORAGES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
"""What K and V may be kept as."""


class Context(ctypes.Structure):
    """Where K and V of one sequence live in one layer."""

    _fields_ = (
        *((name, c_void_p) for name in ("keys", "values", "key_scales", "value_scales", "slots")),
        *((name, c_int64) for name in ("token_stride", "head_stride", "storage", "heads", "size")),
    )


class Sketch(ctypes.Structure):
    """Codes of one sequence's middle tokens in one layer."""

    _fields_ = (
        *((name, c_void_p) for name in ("centroids", "half", "codes", "cells", "order", "starts", "ends", "counts")),
        *(
            (name, c_int64)
            for name in ("subspaces", "bits", "width", "capacity", "length", "sorted", "skip")
        ),
    )  # fmt: skip


class Query(ctypes.Structure):
    """A decode row, or a draft tree's rows, of one sequence in one layer."""

    _fields_ = (
        *((name, c_void_p) for name in ("context", "sketch", "queries", "out")),
        *((name, c_int64) for name in ("rows", "group", "length", "initial", "local", "least", "most")),
        ("keep", c_float),
        ("scale", c_float),
        ("fresh", c_int64),
        ("resort", c_int64),
        *((name, c_void_p) for name in ("value_sum", "own", "mask", "chosen", "found", "logs")),
    )


class Iteration(ctypes.Structure):
    """One iteration of clustering."""

    _fields_ = (
        ("runs", c_void_p),
        *((name, c_int64) for name in ("row_stride", "run_stride", "key_stride")),
        *((name, c_void_p) for name in ("weights", "centroids")),
        *((name, c_int64) for name in ("rows", "subspaces", "keys", "count", "run")),
        *((name, c_void_p) for name in ("codes", "best", "sums", "counts")),
    )


@functools.cache
def _library() -> ctypes.CDLL:
    library = build.load()
    for name, arguments in (
        ("sketch_sizes", (c_void_p,)),
        ("sketch_code", (c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int, c_int)),
        ("sketch_sort", (c_void_p, c_int64, c_int64, c_int)),
        ("sketch_search", (c_void_p, c_int)),
        ("sketch_attend", (c_void_p, c_int64, c_int)),
        ("sketch_iterate", (c_void_p, c_int)),
    ):
        function = getattr(library, f"headrace_{name}")
        function.restype, function.argtypes = None, list(arguments)
    sizes = (c_int64 * 3)()
    library.headrace_sketch_sizes(sizes)
    library.headrace_sketch_iteration_size.restype = c_int64
    found = [*sizes, library.headrace_sketch_iteration_size()]
    expected = [ctypes.sizeof(struct) for struct in (Context, Sketch, Query, Iteration)]
    if found != expected:
        raise RuntimeError(f"sketch.cpp's structs are {found} bytes long, and sketch.py's {expected}")
    return library


def code(sketch: Sketch, context: Context, initial: int, first: int, last: int, *, sort: bool) -> None:
    """Code items [first, last), token ``initial`` + i each, with the sketch's centroids; with ``sort``, sort all below ``last``."""
    _library().headrace_sketch_code(
        ctypes.addressof(sketch), ctypes.addressof(context), initial, first, last, sort, torch.get_num_threads()
    )


def sort_items(sketch: Sketch, heads: int, length: int) -> None:
    """Sort the items below ``length`` by their joint codes, and count them."""
    _library().headrace_sketch_sort(ctypes.addressof(sketch), heads, length, torch.get_num_threads())


def search(query: Query) -> None:
    """Fill ``chosen`` and ``found`` of the query with items of its sketch."""
    _library().headrace_sketch_search(ctypes.addressof(query), torch.get_num_threads())


def attend(queries: ctypes.Array[Query]) -> None:
    """Code, search and attend for all ``queries``, on ``torch.get_num_threads()`` threads of torch's own pool, without the GIL."""
    _library().headrace_sketch_attend(ctypes.addressof(queries), len(queries), torch.get_num_threads())


def iterate(runs: Tensor, weights: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Assign every key to its nearest centroid, and sum up the keys of each.

    Args:
        runs: float32[R, m, s, D / m], of any strides but the last.
        weights: float32[R, s], what a key counts.
        centroids: float32[R, m, C, D / m].

    Returns:
        int64[R, m, s] codes, float32[R, m, s] values of ``x z - |z|^2 / 2``, weighted sums as ``centroids``, and counts
        float32[R, m, C].
    """
    weights, centroids = weights.contiguous(), centroids.contiguous()
    rows, subspaces, keys, run = runs.shape
    codes, best = torch.empty(rows, subspaces, keys, dtype=torch.int64), torch.empty(rows, subspaces, keys)
    sums, counts = torch.zeros_like(centroids), torch.zeros(centroids.shape[:3])
    iteration = Iteration(
        runs.data_ptr(), runs.stride(0), runs.stride(1), runs.stride(2), weights.data_ptr(), centroids.data_ptr(),
        rows, subspaces, keys, centroids.shape[2], run,
        codes.data_ptr(), best.data_ptr(), sums.data_ptr(), counts.data_ptr(),
    )  # fmt: skip
    _library().headrace_sketch_iterate(ctypes.addressof(iteration), torch.get_num_threads())
    return codes, best, sums, counts
