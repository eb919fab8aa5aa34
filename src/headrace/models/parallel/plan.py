"""What transformers' plan for a model splits, and whether it can be split so many ways."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch

from headrace.core.errors import InvalidRequest, UnsupportedModel
from headrace.models.families import kv_shape

MOST = 64
_GATHERED = ("colwise_gather_output", "colwise_rep")
_WHOLE_INPUT = ("rowwise_split_input", "rowwise_rep")
_BY_COLUMNS = ("rowwise", "packed_rowwise", *_WHOLE_INPUT)


def plan_of(kind: Any, config: Any) -> dict[str, str]:
    """transformers' plan for class ``kind``: names with ``*`` for layer numbers to styles.

    Raises:
        UnsupportedModel: it has none for its layers.
    """
    with torch.device("meta"):
        plan: dict[str, str] = dict(kind(config).tp_plan or {})
    if not any(".*." in name for name in plan):
        raise UnsupportedModel(
            f"transformers has no tensor-parallel plan for {kind.__name__}: serve it with tp 1", field="tp"
        )
    return plan


def style_of(plan: dict[str, str], name: str) -> str | None:
    """The style of the module or parameter ``name``, or None where the plan leaves it whole."""
    return plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))


def gathers(style: str | None) -> bool:
    """Whether a column-wise linear of this style hands the whole output to every rank."""
    return style in _GATHERED


def splits_input(style: str | None) -> bool:
    """Whether a row-wise linear of this style gets the whole input and takes its own part of it."""
    return style in _WHOLE_INPUT


def splits_heads(plan: dict[str, str]) -> bool:
    """Whether each rank attends with heads of its own, rather than all ranks with all heads."""
    return any(name.endswith((".k_proj", ".qkv_proj")) and style == "colwise" for name, style in plan.items())


def check(name: str, config: Any, plan: dict[str, str], shapes: dict[str, tuple[int, ...]], size: int) -> None:
    """Check that ``size`` ranks can share a model evenly.

    Args:
        name: the model's, for messages.
        shapes: of its parameters.

    Raises:
        InvalidRequest: they cannot; the message names what does not divide and the sizes that do.
    """
    reason = _obstacle(config, plan, shapes, size)
    if reason is None:
        return
    fitting = [str(n) for n in range(1, MOST + 1) if _obstacle(config, plan, shapes, n) is None]
    raise InvalidRequest(f"tp is {size}, but {name} has {reason}: choose {' or '.join(fitting)}", field="tp")


def local_config(config: Any, plan: dict[str, str], size: int) -> Any:
    """``config`` as one rank sees it: with its own share of heads, from which the size of its slots follows."""
    if not splits_heads(plan):
        return config
    _, heads, width = kv_shape(config)
    local = copy.copy(config)
    local.head_dim = width
    local.num_attention_heads, local.num_key_value_heads = config.num_attention_heads // size, heads // size
    return local


def _obstacle(config: Any, plan: dict[str, str], shapes: dict[str, tuple[int, ...]], size: int) -> str | None:
    """What of the model ``size`` ranks cannot share evenly, in words; None when they can."""
    if splits_heads(plan):
        _, kv_heads, _ = kv_shape(config)
        if config.num_attention_heads % size:
            return f"{config.num_attention_heads} attention heads"
        if kv_heads % size:
            return f"{kv_heads} K and V heads"
    for name, shape in shapes.items():
        style = style_of(plan, name) or style_of(plan, name.rpartition(".")[0])
        split = _split_size(style, name, shape)
        if split is not None and split % size:
            return f"{split} {'columns' if style in _BY_COLUMNS else 'rows'} in {name}"
    return None


def _split_size(style: str | None, name: str, shape: tuple[int, ...]) -> int | None:
    """Length of the side that ``style`` cuts, or None where nothing is cut."""
    if style is None:
        return None
    if style == "embedding_rowwise":
        return shape[0]
    if "colwise" in style:  # packed matrices hold gate and up, each of which is cut
        rows = shape[0] if len(shape) == 1 else shape[-2]
        return rows // 2 if style.startswith("packed") else rows
    return shape[-1] if style in _BY_COLUMNS and not name.endswith("bias") else None
