"""A decoder step in one call: the Python side of ``src/step.cpp``, which says what the structs mean.

Structs hold addresses and keep nothing alive: whoever fills them holds on to the memory behind.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_float, c_int32, c_int64, c_void_p

import torch

from headrace.native import build


class Norm(ctypes.Structure):
    """An RMS norm; none while ``scale`` is null."""

    _fields_ = (("scale", c_void_p), ("width", c_int64), ("epsilon", c_float))


class Planes(ctypes.Structure):
    """Where a layer's K and V live; with scales they are int8 codes."""

    _fields_ = (("keys", c_void_p), ("values", c_void_p), ("key_scales", c_void_p), ("value_scales", c_void_p))


class Layer(ctypes.Structure):
    """One decoder layer."""

    _fields_ = (
        *((name, c_void_p) for name in ("qkv", "out", "gate_up", "down")),
        *(
            (name, Norm)
            for name in ("before_attention", "queries", "keys", "after_attention", "before_mlp", "after_mlp")
        ),
        ("cosines", c_void_p),
        ("sines", c_void_p),
        *((name, c_int64) for name in ("turned", "interleaved", "query_heads", "heads", "size")),
        ("planes", Planes),
        ("attend", c_void_p),
        ("block", c_void_p),
        ("residual", c_float),
        ("activation", c_int32),
        ("gated", c_int64),
    )


class Head(ctypes.Structure):
    """Final norm, LM head and what becomes of its logits."""

    _fields_ = (("norm", Norm), ("matrix", c_void_p), ("scale", c_float), ("softcap", c_float))


class Embedding(ctypes.Structure):
    """The embeddings float32[vocabulary, hidden] and the factor on them."""

    _fields_ = (("table", c_void_p), ("scale", c_float))


class Step(ctypes.Structure):
    """What to run, on which rows, with which buffers."""

    _fields_ = (
        ("layers", c_void_p),
        ("embedding", c_void_p),
        ("head", c_void_p),
        *((name, c_int64) for name in ("begin", "end", "rows", "hidden")),
        *((name, c_void_p) for name in ("ids", "positions", "slots", "wanted")),
        ("logit_rows", c_int64),
        *((name, c_void_p) for name in ("x", "input", "output", "queries", "attended", "bytes", "scales", "logits")),
    )


@functools.cache
def _library() -> ctypes.CDLL:
    library = build.load()
    library.headrace_step.restype, library.headrace_step.argtypes = None, [c_void_p, ctypes.c_int]
    found = (c_int64 * 6)()
    library.headrace_step_sizes(found)
    expected = [ctypes.sizeof(struct) for struct in (Step, Layer, Head, Embedding, Planes, Norm)]
    if list(found) != expected:
        raise RuntimeError(f"step.cpp's structs are {list(found)} bytes long, and step.py's {expected}")
    return library


def run(step: Step) -> None:
    """Run ``step`` on ``torch.get_num_threads()`` threads of torch's own OpenMP pool, without the GIL."""
    _library().headrace_step(ctypes.addressof(step), torch.get_num_threads())
