"""headrace: serve large language models so that every request meets its own latency target.

The names below are imported on first use, so ``import headrace`` costs next to nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from headrace.version import __version__

if TYPE_CHECKING:
    from headrace.core.request import SLO, Request, SamplingParams, Structure
    from headrace.llm import LLM
    from headrace.sparse import PQCache

_LAZY = {
    "LLM": "headrace.llm",
    "PQCache": "headrace.sparse",
    "SLO": "headrace.core.request",
    "Request": "headrace.core.request",
    "SamplingParams": "headrace.core.request",
    "Structure": "headrace.core.request",
}

__all__ = ["LLM", "SLO", "PQCache", "Request", "SamplingParams", "Structure", "__version__"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'headrace' has no attribute {name!r}")
