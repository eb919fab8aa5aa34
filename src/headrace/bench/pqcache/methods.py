"""The methods compared, each with the same number of attended tokens, and contexts that are read once and shared by all of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

INITIAL = 32
DROPPING = ("streaming", "h2o", "snapkv", "pyramidkv")


@dataclass(frozen=True, slots=True)
class Method:
    """A way to attend: dense, a :class:`headrace.sparse.PQCache` (``pq``) or a selector, with its options.

    Attributes:
        name: in rows and tables.
        kind: "dense", "pq" or a name of :data:`headrace.sparse.selectors.SELECTORS`.
        bytes_per_token: of keys or sketch read for a token and KV head in order to choose, at D = 128 and 16 bits.
    """

    name: str
    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    bytes_per_token: float = 0.0


DENSE = Method("dense", "dense", {}, 256.0)
PQ_SMALL = Method("pq 2x6", "pq", {"codes": "2x6"}, 1.5)
PQ_LARGE = Method("pq 4x8", "pq", {"codes": "4x8"}, 4.0)
PQ_RESIDUAL = Method("pq 4x8, residual", "pq", {"codes": "4x8", "residual": True}, 4.0)
BASELINES = (
    Method("oracle", "oracle", {}, 256.0),
    Method("streaming", "streaming"),
    Method("h2o", "h2o"),
    Method("snapkv", "snapkv"),
    Method("pyramidkv", "pyramidkv"),
    Method("sparq 1", "sparq", {"dimensions": 1}, 2.0),
    Method("sparq 16", "sparq", {"dimensions": 16}, 32.0),
    Method("infllm", "infllm", {}, 8.0),
    Method("quest", "quest", {}, 32.0),
)


@dataclass(frozen=True, slots=True)
class Reading:
    """A context that a model has read exactly: per layer K and V [B, H, L, D] and the queries [B, Hq, L, D]; scale of scores."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    queries: tuple[Tensor, ...]
    scale: float

    @property
    def length(self) -> int:
        """Tokens read."""
        return self.keys[0].shape[2]


def read(model: Any, ids: Tensor) -> Reading:
    """Read ``ids`` [B, L] with dense attention, and keep what the layers saw."""
    from transformers.cache_utils import Cache

    from headrace.sparse.regions import Regions
    from headrace.sparse.selectors import SelectedAttention, Selector, enable_selected
    from headrace.sparse.selectors.cache import SelectedLayer

    class Recorder(SelectedLayer):  # type: ignore[no-untyped-call]
        def read(self, query: Tensor, scale: float) -> None:
            self.seen, self.scale = query, scale

    layers: list[Any] = [
        Recorder(SelectedAttention(Selector(), Regions(1.0))) for _ in range(model.config.num_hidden_layers)
    ]
    with torch.inference_mode():
        enable_selected(model)(ids, past_key_values=Cache(layers=layers), logits_to_keep=1)
    return Reading(
        tuple(layer.keys[:, :, : layer.length] for layer in layers),
        tuple(layer.values[:, :, : layer.length] for layer in layers),
        tuple(layer.seen for layer in layers),
        layers[0].scale,
    )


class Started:
    """A method that has taken over a context; :meth:`cache` gives a cache of its own to every continuation and budget."""

    def __init__(self, method: Method, model: Any, context: Reading) -> None:
        self.method, self._model, self._context = method, model, context
        # What a selector learns of a prompt takes some of them long, and does not depend on the budget.
        self._read = None if method.kind in ("dense", "pq") else self._fill(1.0)

    def cache(self, budget: float) -> Any:
        """A cache that holds the context and attends to ``budget`` of it."""
        if self._read is None:
            return self._fill(budget)
        from headrace.sparse.regions import Regions

        cache = copy.deepcopy(self._read)
        for layer in cache.layers:
            layer.attention.regions = Regions(budget, INITIAL)
        return cache

    def _fill(self, budget: float) -> Any:
        cache, context = _empty(self.method, self._model, budget), self._context
        with torch.inference_mode():
            for number, queries in enumerate(context.queries):
                cache.update(context.keys[number], context.values[number], number)
                if self.method.kind not in ("dense", "pq"):
                    cache.layers[number].read(queries, context.scale)
        return cache


def attend_by(method: Method, model: Any) -> Any:
    """Let the model attend as the method's cache wants; gives the model back."""
    from headrace.sparse import enable
    from headrace.sparse.selectors import enable_selected

    return enable(model) if method.kind in ("dense", "pq") else enable_selected(model)


def _empty(method: Method, model: Any, budget: float) -> Any:
    from transformers.cache_utils import DynamicCache

    from headrace.sparse import PQCache
    from headrace.sparse.regions import Regions
    from headrace.sparse.selectors import SelectedCache

    if method.kind == "dense":
        return DynamicCache(config=model.config)
    if method.kind == "pq":
        return PQCache(model.config, budget, initial=INITIAL, crossover=0, **method.options)
    return SelectedCache(model.config, method.kind, Regions(budget, INITIAL), **method.options)


def greedy(model: Any, cache: Any, suffix: Sequence[int], count: int) -> list[int]:
    """``count`` likeliest tokens after the context in ``cache`` and ``suffix``, which is read exactly as part of the prompt."""
    found: list[int] = []
    step = torch.tensor([suffix])
    with torch.inference_mode():
        while len(found) < count:
            logits = model(step, past_key_values=cache, logits_to_keep=1).logits[0, -1]
            found.append(int(logits.argmax()))
            step = torch.tensor([[found[-1]]])
    return found
