"""The bundled pair on text that neither has seen: how many drafted tokens the target accepts, and what int8 K and V cost.

The texts are pieces of documents that were held out when the pair was trained (``heldout.json``, with their licences).
"""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

import numpy as np

CHAIN = 4
PROMPT = 64
"""Tokens of held-out text before a chain of drafts begins."""


def heldout() -> list[dict[str, str]]:
    """``source``, ``licence`` and ``text`` of each piece."""
    found: list[dict[str, str]] = json.loads(
        (files("headrace.bench.closedloop") / "heldout.json").read_text(encoding="utf-8")
    )
    return found


def kv_rows(*, quick: bool = False) -> list[dict[str, Any]]:
    """Mean negative log-likelihood in nats of the bundled target with K and V in float32 and in int8, per source (kind ``kv``)."""
    from headrace.models import quality
    from headrace.models.cache.slots import SlotPool
    from headrace.models.load import load
    from headrace.models.runner import ModelRunner
    from headrace.models.text.tokenizer import Tokenizer

    losses: dict[str, list[tuple[str, int, float]]] = {}
    for dtype in ("auto", "int8"):
        model = load("bundled", dtype="float32", device="cpu", progress=False)
        limit = min(256 if quick else 1024, model.card.context)
        pool = SlotPool(limit)
        runner, tokenizer = ModelRunner(model, pool, kv_cache_dtype=dtype), Tokenizer(model.card.path)
        losses[dtype] = []
        for piece in heldout():
            ids = np.asarray(tokenizer.encode(piece["text"])[:limit], np.int32)
            reading = quality.read(runner, pool, ids, seconds=60.0)
            losses[dtype].append((piece["source"], len(reading.losses), float(reading.losses.mean())))
    return [
        {"kind": "kv", "source": source, "tokens": tokens, "nll": exact, "nll_int8": rounded}
        for (source, tokens, exact), (_, again, rounded) in zip(losses["auto"], losses["int8"], strict=True)
        if tokens == again
    ]


def draft_rows(*, quick: bool = False) -> list[dict[str, Any]]:
    """How many tokens of a greedy chain of four the target accepts, as counts of 0 to 4 per source (kind ``drafts``).

    ``along`` "text": from places in held-out text, one chain each. "continuation": from every place of the target's own greedy
    continuation of held-out prompts. A drafted token is accepted while the whole chain before it is the target's own choice, so
    the draft reads the target's tokens, and what counts is the run of equal choices.
    """
    import torch
    import transformers

    from headrace.models.checkpoints.hub import resolve
    from headrace.models.text.tokenizer import Tokenizer

    hub: Any = transformers
    target, draft = (
        hub.AutoModelForCausalLM.from_pretrained(resolve(name), dtype=torch.float32).eval()
        for name in ("bundled", "bundled-draft")
    )
    tokenizer = Tokenizer(str(resolve("bundled")))
    rows = []
    for piece in heldout():
        ids = torch.tensor(tokenizer.encode(piece["text"]))
        windows = ids.unfold(0, PROMPT, 96 if quick else 32)
        starts = windows[:: max(1, len(windows) // 16)]
        for along, prompts, new in (("text", windows, CHAIN), ("continuation", starts, 16 if quick else 64)):
            runs = accepted_runs(target, draft, prompts, new)
            counts = torch.bincount(runs.flatten(), minlength=CHAIN + 1).tolist()
            rows.append({"kind": "drafts", "source": piece["source"], "along": along, "runs": counts})
    return rows


def accepted_runs(target: Any, draft: Any, prompts: Any, new: int) -> Any:
    """Accepted tokens of a chain of four drafts that begins at each place of the target's greedy continuation.

    Args:
        target, draft: causal language models of transformers over the same vocabulary.
        prompts: int64[B, P].
        new: tokens of the continuation, at least :data:`CHAIN`.

    Returns:
        int64[B, new - CHAIN + 1] from 0 to :data:`CHAIN`.
    """
    import torch

    with torch.inference_mode():
        settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        made = target.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new, min_new_tokens=new, **settings
        )
        chosen = draft(made[:, :-1], logits_to_keep=new).logits.argmax(-1)
        equal = (chosen == made[:, prompts.shape[1] :]).long()
        return equal.unfold(1, CHAIN, 1).cumprod(2).sum(2)
