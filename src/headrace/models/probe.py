"""A self-check for models whose family nobody tested: attention over slots against the model's own, on a few tokens.

A class may carry the attention interface and still do something around it that slots cannot do (a mask made from values, a
layer run twice). Such a model would answer nonsense without an error, so it is compared once, when it loads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from headrace.core.batch import Packer, Segment
from headrace.core.errors import HeadraceError, UnsupportedModel
from headrace.models.cache.slots import SlotPool
from headrace.models.runner import ModelRunner

if TYPE_CHECKING:
    from headrace.models.loaded import LoadedModel

TOKENS = 24
# Largest relative error of a row's logits, as the median over rows: half precision may flip an expert of a row or two.
EXACT, ROUNDED = 1e-3, 0.1


def verify(model: LoadedModel) -> None:
    """Compare two packed chunks of one sequence with transformers' own forward.

    Raises:
        UnsupportedModel: when they differ, or the packed form cannot run at all.
    """
    module = model.module
    before = module.config._attn_implementation
    ids = np.random.default_rng(0).integers(0, model.card.vocab_size, TOKENS).astype(np.int32)
    with torch.inference_mode():
        expected = module(torch.from_numpy(ids).long().to(model.device)[None], use_cache=False).logits[0].float()
    try:
        found = _packed(model, ids)
    except HeadraceError:
        raise
    except (RuntimeError, TypeError, AttributeError, KeyError, IndexError) as error:
        raise UnsupportedModel(
            f"{type(module).__name__} cannot run over slots ({error}): serve it with plain transformers instead",
            field="model",
        ) from error
    finally:
        module.set_attn_implementation(before)
    worst = ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median().item()
    if not worst <= (EXACT if model.dtype == torch.float32 else ROUNDED):
        raise UnsupportedModel(
            f"{type(module).__name__} gives other logits over slots than by itself (median relative error {worst:.1e}): "
            "its attention does something headrace does not know. Serve it with plain transformers instead.",
            field="model",
        )


def _packed(model: LoadedModel, ids: np.ndarray) -> Tensor:
    """Logits of ``ids`` in two chunks, over slots in reverse order."""
    runner = ModelRunner(model, SlotPool(TOKENS), "reference")
    slots = np.arange(TOKENS, dtype=np.int32)[::-1].copy()
    positions, cut = np.arange(TOKENS, dtype=np.int32), TOKENS // 3
    parts = []
    for lo, hi in ((0, cut), (cut, TOKENS)):
        rows = np.arange(hi - lo, dtype=np.int32)
        segment = Segment(0, ids[lo:hi], positions[lo:hi], slots[lo:hi], slots[:lo], rows)
        parts.append(runner.run(Packer().pack([segment])).logits)
    return torch.cat(parts)
