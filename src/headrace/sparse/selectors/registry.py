"""Names of selectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headrace.core.errors import InvalidRequest
from headrace.sparse.selectors.base import Place, Selector
from headrace.sparse.selectors.dropping import H2O, PyramidKV, SnapKV, StreamingLLM
from headrace.sparse.selectors.exact import Full, Oracle
from headrace.sparse.selectors.sketching import InfLLM, ProductQuantised, Quest, SparQ

SELECTORS: Mapping[str, type[Selector]] = {
    "full": Full,
    "oracle": Oracle,
    "streaming": StreamingLLM,
    "h2o": H2O,
    "snapkv": SnapKV,
    "pyramidkv": PyramidKV,
    "sparq": SparQ,
    "infllm": InfLLM,
    "quest": Quest,
    "pq": ProductQuantised,
}


def make(name: str, place: Place | None = None, **options: Any) -> Selector:
    """A selector for one layer of one context; ``options`` are its constructor's.

    Raises:
        InvalidRequest: no such selector, or an option it has not.
    """
    if name not in SELECTORS:
        raise InvalidRequest(f"there is no selector {name!r}: choose from {', '.join(SELECTORS)}", field="selector")
    try:
        return SELECTORS[name](place, **options)
    except TypeError as error:
        raise InvalidRequest(f"selector {name}: {error}", field="selector") from error
