"""Steps of our engine: the share that is not the model, and what a step with a draft tree costs beside one with a single token."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from headrace.core.batch import Ints, Packer, Segment
from headrace.core.config import EngineConfig
from headrace.core.policy import Limits
from headrace.core.request import Request, SamplingParams

CONTEXT = 160
"""Tokens in slots when a tree is verified: about the middle of an answer in the closed loop."""

# Parents per node. Node 0 is the token that any step would feed, the others are drafts: a trunk with branches.
TREES = {1: [-1], 8: [-1, 0, 1, 2, 0, 4, 1, 0], 16: [-1, 0, 1, 2, 3, 4, 0, 6, 7, 1, 9, 0, 11, 2, 0, 14]}


def overhead_rows(checkpoint: Path, *, quick: bool = False) -> list[dict[str, Any]]:
    """Share of a decode step spent outside the forward, one row per repeat and batch size (kind ``overhead``)."""
    from headrace.compose import build_engine

    config = EngineConfig(
        model=str(checkpoint), dtype="float32", prefix_cache=False, kv_gib=0.5, limits=Limits(max_step_tokens=1024)
    )
    engine = build_engine(config, progress=False)
    draw, new = random.Random(0), 16 if quick else 48
    rows = []
    for repeat in range(1 if quick else 3):
        for batch in (1, 8):
            params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
            for place in range(batch):
                prompt = tuple(draw.randrange(5, engine.card.vocab_size) for _ in range(128))
                engine.add(Request(f"{repeat}-{batch}-{place}", prompt, params))
            whole, outside = [], []
            while engine.busy:
                engine.step()
                stats = engine.stats()
                whole.append(stats.step_ms)
                outside.append(stats.step_ms - stats.forward_ms)
            # The first step holds the prompts.
            share = sum(outside[1:]) / sum(whole[1:])
            rows.append({"kind": "overhead", "batch": batch, "repeat": repeat, "outside_forward_share": share})
    engine.close()
    return rows


def tree_rows(checkpoint: Path, *, quick: bool = False) -> list[dict[str, Any]]:
    """Milliseconds of steps over one sequence with trees of 1, 8 and 16 nodes (kind ``tree``), taken in turns in float32."""
    from headrace.models.cache.slots import SlotPool
    from headrace.models.fused.linear import choose_linears
    from headrace.models.load import load
    from headrace.models.runner import ModelRunner

    model = load(str(checkpoint), dtype="float32", device="cpu", progress=False)
    choose_linears(model, "auto", None)
    pool = SlotPool(CONTEXT + max(TREES))
    runner, packer = ModelRunner(model, pool), Packer()
    slots = pool.take(CONTEXT)
    ids = np.random.default_rng(0).integers(5, runner.vocab_size, CONTEXT).astype(np.int32)
    places = np.arange(CONTEXT, dtype=np.int32)
    runner.run(packer.pack([Segment(0, ids, places, slots, slots[:0], places[-1:])]))
    drafts = pool.take(max(TREES))
    taken: dict[int, list[float]] = {rows: [] for rows in TREES}
    for turn in range(10 if quick else 60):
        for rows, segment in tree_segments(slots, drafts):
            started = time.perf_counter()
            runner.run(packer.pack([segment]))
            if turn >= 5:  # the first ones warm up
                taken[rows].append((time.perf_counter() - started) * 1e3)
    return [{"kind": "tree", "rows": rows, "context": CONTEXT, "ms": ms} for rows, ms in taken.items()]


def tree_segments(slots: Ints, drafts: Ints) -> Iterator[tuple[int, Segment]]:
    """A segment per tree of :data:`TREES`, after the context in ``slots`` and written to ``drafts``."""
    for rows, parents in TREES.items():
        depth: list[int] = []
        for parent in parents:
            depth.append(0 if parent < 0 else depth[parent] + 1)
        yield rows, Segment(
            0, np.arange(rows, dtype=np.int32) * 7 + 5, np.asarray(depth, np.int32) + len(slots), drafts[:rows], slots,
            np.arange(rows, dtype=np.int32), parents=None if rows == 1 else np.asarray(parents, np.int32), purpose="verify",
        )  # fmt: skip
