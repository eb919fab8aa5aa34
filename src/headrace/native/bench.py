"""Times the packed product against torch's: ``python -m headrace.native.bench [--threads 1 2] [--rows 1 8] [--shapes 768x2048]``.

Prints the median milliseconds of ``x[M, K] @ W[N, K].T`` for each contestant of the chosen groups, and the rate at which the
last one read its weights:

- ``float32``: torch's linear, oneDNN's on weights reordered in advance (where torch has it), the packed product on float32 and on
  bfloat16 weights;
- ``int8``: torch's dynamically quantised linear by its x86 (fbgemm) and oneDNN engines, the bare integer product
  ``torch._int_mm`` (which neither quantises nor scales), and the packed product on int8 weights;
- ``nf4``: torch's linear on float32 weights, the packed product on nf4 weights.

The contestants take turns, so that a change in the machine's load meets them all.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
import warnings
from collections.abc import Callable

import torch

from headrace.native import build
from headrace.native.skinny import PackedMatrix, has_tiles, isa

SHAPES = ["2048x768", "768x2048", "768x768", "32000x768", "4096x4096"]
ROWS = [1, 4, 8, 16, 32, 64, 128, 1024]

BYTES = {"float32": 4.0, "int8": 1.0, "nf4": 0.53125}
"""Per weight of the packed product."""

Runs = dict[str, Callable[[], object]]
Contestants = Callable[[torch.Tensor], Runs]


def float_contestants(weight: torch.Tensor) -> Contestants:
    """Products in float32."""
    full = PackedMatrix(weight, storage="float32")
    half = PackedMatrix(weight.bfloat16().float(), storage="bfloat16")

    def of(x: torch.Tensor) -> Runs:
        runs: Runs = {"torch": lambda: torch.nn.functional.linear(x, weight)}
        onednn = torch.ops.mkldnn
        if hasattr(onednn, "_linear_pointwise") and hasattr(onednn, "_reorder_linear_weight"):
            reordered = onednn._reorder_linear_weight(weight, len(x))
            runs["onednn"] = lambda: onednn._linear_pointwise(x, reordered, None, "none", [], "")
        return runs | {"bf16": lambda: half.matmul(x), "packed": lambda: full.matmul(x)}

    return of


def int8_contestants(weight: torch.Tensor) -> Contestants:
    """Products in int8."""
    supported = [engine for engine in ("x86", "onednn") if engine in torch.backends.quantized.supported_engines]
    dynamic = {engine: _dynamic(weight, engine) for engine in supported}
    levels = torch.randint(-127, 128, tuple(reversed(weight.shape)), dtype=torch.int8)
    packed = PackedMatrix(weight, storage="int8")

    def of(x: torch.Tensor) -> Runs:
        runs: Runs = {name: functools.partial(linear, x) for name, linear in dynamic.items()}
        if len(x) > 16:  # what it takes
            left = torch.randint(-127, 128, x.shape, dtype=torch.int8)
            runs["int_mm"] = lambda: torch._int_mm(left, levels)
        return runs | {"packed": lambda: packed.matmul(x)}

    return of


def nf4_contestants(weight: torch.Tensor) -> Contestants:
    """Products with 4-bit weights."""
    packed = PackedMatrix(weight, storage="nf4")
    return lambda x: {"torch": lambda: torch.nn.functional.linear(x, weight), "packed": lambda: packed.matmul(x)}


GROUPS = {"float32": float_contestants, "int8": int8_contestants, "nf4": nf4_contestants}


def _dynamic(weight: torch.Tensor, engine: str) -> Callable[[torch.Tensor], object]:
    """torch's dynamically quantised linear, packed for ``engine``."""
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            quantised = torch.ao.quantization.quantize_dynamic(  # type: ignore[no-untyped-call]
                torch.nn.Sequential(linear), {torch.nn.Linear}
            )
    finally:
        torch.backends.quantized.engine = before
    return lambda x: quantised(x)


def medians(runs: Runs, repeats: int) -> dict[str, float]:
    """Median milliseconds of each, measured in turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 2):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if repeat >= 2:
                times[name].append((time.perf_counter() - started) * 1e3)
    return {name: statistics.median(series) for name, series in times.items()}


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description="Packed product against torch's.")
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="NxK")
    parser.add_argument("--groups", nargs="+", default=list(GROUPS), choices=list(GROUPS))
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    if not build.available():
        parser.exit(2, f"{build.why_not()}\n")
    print(f"instruction set: {isa()}, matrix tiles: {has_tiles()}; milliseconds, medians of {options.repeats}")
    for threads in options.threads:
        torch.set_num_threads(threads)
        for shape in options.shapes:
            columns, depth = (int(size) for size in shape.split("x"))
            weight = torch.randn(columns, depth)
            for group in options.groups:
                contestants = GROUPS[group](weight)
                for rows in options.rows:
                    with torch.inference_mode():
                        found = medians(contestants(torch.randn(rows, depth)), options.repeats)
                    cells = "  ".join(f"{name} {ms:8.3f}" for name, ms in found.items())
                    rate = weight.numel() * BYTES[group] / found["packed"] / 1e6
                    operations = 2 * weight.numel() * rows / found["packed"] / 1e6
                    print(
                        f"{threads} threads  {group:>7} {shape:>10}  M={rows:<4} {cells}  "
                        f"{rate:6.1f} GB/s {operations:6.0f} Gop/s",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
