"""Runs compiled workers on the thread team that torch's operators run on.

A process that computes with two thread pools pays for it: after a parallel region the workers of an OpenMP runtime spin for
a while in wait of the next one, on the very cores the other pool wants. So the workers here run inside a parallel region of the
OpenMP runtime that torch has loaded. ``GOMP_parallel`` is the entry point that compilers emit calls to; libgomp, and for compatibility
LLVM's and Intel's runtimes, export it. Where it cannot be found a worker runs on the calling thread alone.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch

from headrace.native.build import NativeUnavailable, find_openmp


@functools.cache
def _parallel() -> Any:
    try:
        entry = ctypes.CDLL(str(find_openmp())).GOMP_parallel
    except (NativeUnavailable, OSError, AttributeError):
        return None
    entry.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    entry.restype = None
    return entry


def run(worker: int, argument: int, *, threads: int) -> None:
    """Call the C function at address ``worker`` with the pointer ``argument`` on up to ``threads`` threads at once, without the GIL.

    Returns when all calls have. The threads in use never exceed torch's own number.
    """
    entry = _parallel()
    count = min(threads, torch.get_num_threads())
    if entry is None or count <= 1:
        _serial(worker)(argument)
    else:
        entry(worker, argument, count, 0)


@functools.cache
def _serial(worker: int) -> Any:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(worker)
