"""Times the packed product against torch's: ``python -m headrace.native.bench [--threads 1 2] [--rows 1 8] [--shapes 768x2048]``.

Prints the median milliseconds of ``x[M, K] @ W[N, K].T`` for torch's linear, oneDNN's on weights reordered in advance (where
torch has it), and the packed product with float32 and bfloat16 storage, and the rate at which the packed float32 weights
were read. The contestants take turns, so that a change in the machine's load meets them all.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from headrace.native import build
from headrace.native.skinny import PackedMatrix, isa

SHAPES = ["8192x4096", "2048x768", "768x2048", "768x768", "32000x768", "8192x256"]
ROWS = [1, 2, 4, 8, 16, 32, 64, 128]


def contestants(weight: torch.Tensor, x: torch.Tensor) -> dict[str, Callable[[], object]]:
    """What is compared, by name."""
    runs: dict[str, Callable[[], object]] = {"torch": lambda: torch.nn.functional.linear(x, weight)}
    onednn = torch.ops.mkldnn
    if hasattr(onednn, "_linear_pointwise") and hasattr(onednn, "_reorder_linear_weight"):
        reordered = onednn._reorder_linear_weight(weight, len(x))
        runs["onednn"] = lambda: onednn._linear_pointwise(x, reordered, None, "none", [], "")
    full, half = PackedMatrix(weight, storage="float32"), PackedMatrix(weight.bfloat16().float())
    runs["packed"] = lambda: full.matmul(x)
    runs["bf16"] = lambda: half.matmul(x)
    return runs


def medians(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
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
    parser = argparse.ArgumentParser(description="Packed product against torch's linear.")
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="NxK")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    if not build.available():
        parser.exit(2, f"{build.why_not()}\n")
    print(f"instruction set: {isa()}; milliseconds, medians of {options.repeats}")
    for threads in options.threads:
        torch.set_num_threads(threads)
        for shape in options.shapes:
            columns, depth = (int(size) for size in shape.split("x"))
            weight = torch.randn(columns, depth)
            for rows in options.rows:
                with torch.inference_mode():
                    found = medians(contestants(weight, torch.randn(rows, depth)), options.repeats)
                cells = "  ".join(f"{name} {ms:8.3f}" for name, ms in found.items())
                rate = weight.nbytes / found["packed"] / 1e6
                print(f"{threads} threads  {shape:>10}  M={rows:<4} {cells}  {rate:6.1f} GB/s", flush=True)


if __name__ == "__main__":
    main()
