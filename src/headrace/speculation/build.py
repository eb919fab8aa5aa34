"""Drafters for a model that is in memory: what the option ``draft`` asks for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from headrace.core.speculation import DraftCosts, Drafter, DraftJob
from headrace.speculation.ngram import NGramDrafter

if TYPE_CHECKING:
    from headrace.models.loaded import LoadedModel

_TRIALS = (1, 4, 16)
_DEPTH = 4


def draft_checkpoint(draft: str, model: str) -> str | None:
    """The checkpoint to draft with for ``model``: "auto" knows the pair that ships with headrace, and no other; None is none."""
    if draft == "auto":
        return "bundled-draft" if model == "bundled" else None
    return None if draft in ("ngram", "off") else draft


def build_drafters(
    draft: str, model: str, target: LoadedModel, *, slots: int, attention: str = "auto", linears: str = "auto"
) -> list[Drafter]:
    """The drafters of an engine, the best first; none when ``draft`` is "off".

    Args:
        draft: "auto", "ngram", "off", or a checkpoint's folder or name.
        model: as the target was named.
        target: the target in memory.
        slots: tokens the draft model may keep K and V of.
        attention, linears: as for the target.

    Raises:
        HeadraceError: the draft's checkpoint cannot be loaded, or its vocabulary is not the target's.
    """
    if draft == "off":
        return []
    drafters: list[Drafter] = []
    name = draft_checkpoint(draft, model)
    if name is not None:
        drafters.append(_model_drafter(name, target, slots, attention, linears))
    return [*drafters, NGramDrafter()]


def _model_drafter(name: str, target: LoadedModel, slots: int, attention: str, linears: str) -> Drafter:
    from headrace.models.beam import likeliest
    from headrace.models.cache.slots import SlotPool
    from headrace.models.fused.linear import choose_linears
    from headrace.models.load import load
    from headrace.models.runner import ModelRunner
    from headrace.models.text.tokenizer import Tokenizer, check_same_vocabulary
    from headrace.speculation.model_drafter import ModelDrafter

    small = load(name, dtype=str(target.dtype).removeprefix("torch."), device=str(target.device), progress=False)
    check_same_vocabulary(Tokenizer(Path(target.path)), Tokenizer(Path(small.path)))
    choose_linears(small, linears, None)
    pool = SlotPool(slots)
    words = min(small.card.vocab_size, target.card.vocab_size)  # paddings differ
    return ModelDrafter(
        ModelRunner(small, pool, attention=attention),
        pool,
        lambda logits, count: likeliest(logits[:, :words], count),  # type: ignore[index]
        context=small.card.context,
    )


def measure(drafters: Sequence[Drafter], costs: DraftCosts, vocab_size: int) -> None:
    """Draft a little, so that kernels are compiled and ``costs`` knows what to expect."""
    import time

    generator = np.random.default_rng(0)
    for drafter in drafters:
        for count in _TRIALS:
            jobs = [DraftJob(-1 - n, generator.integers(0, vocab_size, 16, np.int32), _DEPTH) for n in range(count)]
            drafter.draft(jobs)  # the prompts
            drafter.draft(jobs)
            started = time.perf_counter()
            drafter.draft(jobs)
            costs.observe(drafter.name, count, _DEPTH, 1, (time.perf_counter() - started) * 1e3)
            for job in jobs:
                drafter.forget(job.sequence)
