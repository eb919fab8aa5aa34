"""Captured steps against steps run kernel by kernel: by CUDA graphs on a GPU, by tapes under Triton's interpreter."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
from tests import tiny
from tests.models.packing import Fed, feed, ints, random_tree, scattered

from headrace.core.batch import Packer
from headrace.models.cache.slots import SlotPool
from headrace.models.graphs import Capture, CudaCapture
from headrace.models.runner import ModelRunner

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SLOTS = 512
FAMILIES = ["qwen3", "mistral"] if INTERPRETED else tiny.FAMILIES  # the interpreter takes milliseconds for every tile
TOLERANCE = 1e-4


def capture(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Capture:
    if not INTERPRETED:
        return CudaCapture()
    from tests.models.tape import TapeCapture

    return TapeCapture(monkeypatch, **options)


def runner(family: str, graphs: bool | Capture, kv_cache_dtype: str = "auto") -> tuple[ModelRunner, SlotPool]:
    """A runner over :data:`SLOTS` slots and one more, from which graphs take theirs."""
    model = tiny.loaded(family)
    if not INTERPRETED:
        model.device = torch.device("cuda")
        model.module.to(model.device)
    pool = SlotPool(SLOTS + 1)
    attention = "reference" if graphs is False else "triton"
    return ModelRunner(model, pool, attention, kv_cache_dtype, graphs=graphs), pool


def sequences() -> list[Fed]:
    """Slot 0 is left to the graphs."""
    made = scattered([60, 41, 25], seed=1, pool=SLOTS - 1)
    for sequence in made:
        sequence.slots = sequence.slots + 1
    return made


def schedule(run: ModelRunner) -> list[torch.Tensor]:
    """Logits of prompts, decode steps of one to three sequences, and two trees of other sizes."""
    fed = sequences()
    feed(run, fed, [33, 8, 3])  # more than a tile: no graph
    for counts in ([1, 0, 0], [1, 1, 1], [0, 1, 0], [1, 1, 1]):
        feed(run, fed, counts)
    logits = [torch.cat(sequence.logits) for sequence in fed]
    rng = np.random.default_rng(4)
    free = ints(np.setdiff1d(np.arange(1, SLOTS), np.concatenate([s.slots for s in fed])))
    for nodes in (5, 7):
        tokens, parents = ints(rng.integers(4, tiny.VOCAB, nodes)), random_tree(rng, nodes)
        tree = fed[0].tree(tokens, parents, free[:nodes])
        tree.wanted = ints([0, 2, nodes - 1])
        logits.append(run.run(Packer().pack([tree])).logits)
    return [part.cpu() for part in logits]


def worst(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("family", "kv"), [*((family, "auto") for family in FAMILIES), ("qwen3", "int8")])
def test_replayed_steps_equal_launched_ones(family: str, kv: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graphed, _ = runner(family, capture(monkeypatch), kv)
    found = schedule(graphed)
    assert graphed.graphs is not None
    assert graphed.graphs.obstacle is None
    assert len(graphed.graphs) == 3, "one and four rows of decoding, and a tree of eight"
    plain, _ = runner(family, False, kv)
    assert worst(found, schedule(plain)) <= TOLERANCE


def test_a_graph_that_does_nothing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: later steps of a key would show the first one's logits."""
    if not INTERPRETED:
        pytest.skip("a CUDA graph cannot be told to do nothing")
    graphed, _ = runner("qwen3", capture(monkeypatch, silent=True))
    plain, _ = runner("qwen3", False)
    assert worst(schedule(graphed), schedule(plain)) > 1e-2


def test_padding_writes_to_its_own_slot_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    graphed, pool = runner("qwen3", capture(monkeypatch))
    fed = sequences()
    feed(graphed, fed, [33, 2, 5])
    before = pool.plane("k.1").cpu().clone()
    feed(graphed, fed, [1, 1, 1])  # padded to four
    changed = (pool.plane("k.1").cpu() != before).flatten(1).any(1).nonzero().flatten().tolist()
    assert sorted(changed) == sorted([0, *(int(s.slots[s.done - 1]) for s in fed)])


def test_long_contexts_have_graphs_of_more_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.models.attention.gpu_cut.PART", 16)
    monkeypatch.setattr("headrace.models.attention.gpu_static.PART", 16)
    graphed, _ = runner("mistral", capture(monkeypatch))
    plain, _ = runner("mistral", False)
    assert worst(schedule(graphed), schedule(plain)) <= TOLERANCE


def test_what_cannot_be_captured_runs_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(run: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    graphed, _ = runner("qwen3", refuse)
    plain, _ = runner("qwen3", False)
    assert worst(schedule(graphed), schedule(plain)) <= TOLERANCE
    assert graphed.graphs is not None
    assert graphed.graphs.obstacle == "operation not permitted when stream is capturing"
