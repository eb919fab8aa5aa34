"""The one attention function headrace registers with transformers, and the per-step object that travels to it.

Every supported class looks its attention function up by name and passes unknown keyword arguments of its forward through to it.
We register the name ``"headrace"`` and pass the step as ``headrace_step``; nothing is patched. The name is deliberately absent from the
mask registry, so that no attention mask is ever built: the step knows who may see whom.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from headrace.models.cache.planes import write

if TYPE_CHECKING:
    from headrace.models.attention import AttentionBackend, AttentionStep
    from headrace.models.attention.retrieving import Retriever
    from headrace.models.cache.planes import Scales

NAME = "headrace"


class StepMissing(RuntimeError):
    """Attention was called without a step: outside a runner, or by a model that keeps keyword arguments from its attention."""


@dataclass(slots=True)
class Step:
    """What one forward pass needs at every attention layer.

    Attributes:
        backend: who computes attention.
        attention: the backend's own view of the batch, prepared once.
        keys, values: per layer, the planes [slots, Hkv, D] that hold K and V.
        write_slots: int64[N], where each token's K and V go.
        scales: per layer, the scales float32[slots, Hkv] of K and V where the planes are int8, else None.
        retriever: who attends to some of the segments, and ``bare``, the backend's view of the batch without these segments'
            context; None where the backend attends to all.
        calls: attention calls so far, to notice a model that goes around the hook.
    """

    backend: AttentionBackend
    attention: AttentionStep
    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    write_slots: Tensor
    scales: Sequence[Scales] | None = None
    retriever: Retriever | None = None
    bare: AttentionStep | None = None
    calls: int = field(default=0)


def attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    headrace_step: Step | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Write this layer's K and V to their slots, then attend over the slots.

    Args:
        module: the attention module; ``layer_idx`` says which planes are its own.
        query, key, value: [1, H, N, D], rotary positions applied.
        scaling: factor on the scores; 1 / sqrt(D) when None.
        headrace_step: the step; without it the model was called outside a runner.
        sliding_window: a query at position p sees keys at positions above ``p - sliding_window``.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        s_aux: [Hq] attention sinks, one extra logit per head that takes weight and gives no value.

    Returns:
        [1, N, Hq, Dv] and no weights.
    """
    if headrace_step is None:
        raise StepMissing(
            "this model is held by a headrace runner and its attention needs the runner's step: run it through the runner, "
            "or give it back with model.set_attn_implementation('sdpa')"
        )
    step, layer = headrace_step, module.layer_idx
    keys, values = step.keys[layer], step.values[layer]
    scales = None if step.scales is None else step.scales[layer]
    for plane, rows, which in ((keys, key, 0), (values, value, 1)):
        write(plane, step.write_slots, rows[0].transpose(0, 1), None if scales is None else scales[which])
    step.calls += 1
    # Windows, soft caps and sinks are the backend's business alone: their layers see the whole context.
    plain = sliding_window is None and softcap is None and s_aux is None
    retriever = step.retriever if plain else None
    queries, scale = query[0].transpose(0, 1), query.shape[-1] ** -0.5 if scaling is None else scaling
    out = step.backend.attend(
        queries,
        keys,
        values,
        step.attention if retriever is None or step.bare is None else step.bare,
        scale=scale,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
        scales=scales,
    )
    if retriever is not None:
        retriever.attend(layer, queries, keys, values, out, scale, scales)
    return out.unsqueeze(0), None


def install(module: Any) -> None:
    """Make ``module`` (a transformers model) call :func:`attention_forward`; registering twice is harmless."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention_forward)
    if module.config._attn_implementation != NAME:
        module.set_attn_implementation(NAME)
