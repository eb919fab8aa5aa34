"""Figures of AdaServe (EuroSys 2026) to hold simulations against: printed where exact, read off the plots within about 2 otherwise."""

from __future__ import annotations

import hashlib
import lzma
from functools import cache
from pathlib import Path

TRACE_SHA256 = "0bdf6548e3658e92c8201342ab73f3a5fbe9bd26f95d93607277caa6c3f0a6da"
"""Of the artifact's trace of 4.0 requests a second, uncompressed: the one that figures are held against."""

PUBLISHED_NAMES = {
    "adaserve": "AdaServe",
    "chunked": "Sarathi-Serve",
    "prefill-first": "vLLM",
    "vllm-spec-4": "vLLM-Spec(4)",
    "vllm-spec-6": "vLLM-Spec(6)",
    "vllm-spec-8": "vLLM-Spec(8)",
}
"""What our policies stand for there."""

_ORDER = ("adaserve", "chunked", "prefill-first", "vllm-spec-4", "vllm-spec-6", "vllm-spec-8")


def _at(*values: float) -> dict[str, float]:
    return dict(zip(_ORDER, values, strict=True))


FIGURE_8: dict[str, dict[float, dict[str, float]]] = {
    "llama": {
        2.6: _at(98, 56, 47, 98, 98, 96),
        3.4: _at(94, 44, 40, 91, 91, 79),
        4.2: _at(90, 39, 32, 70, 70, 43),
        4.8: _at(86.5, 33, 26, 34, 41.5, 26),
    },
    "qwen": {
        2.4: _at(99, 90, 70, 99, 97, 91),
        3.2: _at(93, 66, 47, 86, 71, 52),
        3.6: _at(92, 59, 45, 78, 57, 34),
        4.2: _at(86, 50, 40, 53, 30, 15),
    },
}
"""SLO attainment in per cent by model and requests a second."""

GOODPUT_AT_MOST = {"llama": 435.0, "qwen": 440.0}
"""Tokens a second of the best baseline at the highest rate (figure 9)."""


@cache
def is_published(trace: Path) -> bool:
    """Whether ``trace`` is the artifact's own, so that its figures may be held against a replay."""
    digest = hashlib.sha256()
    try:
        with lzma.open(trace) if trace.suffix == ".xz" else trace.open("rb") as file:
            digest.update(file.read())
    except (OSError, EOFError, lzma.LZMAError):
        return False
    return digest.hexdigest() == TRACE_SHA256
