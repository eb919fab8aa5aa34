"""The runner against transformers' own forward: packing, chunks, decode, trees, and what it must not compute."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from tests import tiny
from tests.models.packing import (
    TOLERANCE,
    Fed,
    feed,
    ints,
    make_runner,
    path_to,
    random_tree,
    scattered,
    truth,
)

from headrace.core.batch import Packer
from headrace.core.errors import InvalidRequest, OutOfMemory, UnsupportedModel
from headrace.models.cache.slots import SlotPool
from headrace.models.load import load
from headrace.models.runner import ModelRunner

WINDOWED = ["mistral", "gemma2", "gemma3", "gpt_oss"]


@functools.cache
def plain(family: str) -> Any:
    return tiny.build(family, "eager")


def error_of(family: str, sequences: list[Fed]) -> float:
    return max((torch.cat(s.logits) - truth(plain(family), s.ids)).abs().max().item() for s in sequences)


def run_schedule(runner: ModelRunner, sequences: list[Fed], seed: int) -> None:
    """Random chunk sizes, one-token steps among them, some sequences sitting out."""
    rng = np.random.default_rng(seed)
    while any(s.done < len(s.ids) for s in sequences):
        counts = [int(c) for c in rng.choice([0, 1, 1, 3, 17], len(sequences))]
        if any(c and s.done < len(s.ids) for c, s in zip(counts, sequences, strict=True)):
            feed(runner, sequences, counts)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_packed_chunks_and_decode_equal_whole_sequences(family: str) -> None:
    sequences = scattered([45, 33, 20], seed=1)
    run_schedule(make_runner(family), sequences, seed=2)
    assert error_of(family, sequences) <= TOLERANCE
    for s in sequences:
        assert torch.equal(torch.cat(s.logits).argmax(-1), truth(plain(family), s.ids).argmax(-1))


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
def test_fast_backend_equals_whole_sequences(family: str) -> None:
    runner = make_runner(family, "auto")
    sequences = scattered([45, 33, 20], seed=1)
    run_schedule(runner, sequences, seed=2)
    assert error_of(family, sequences) <= TOLERANCE


def tree_error(family: str, runner: ModelRunner, parents: np.ndarray, told: np.ndarray) -> float:
    """Largest error of a tree's logits against each path run alone; the runner is told the parents ``told``."""
    nodes = len(parents)
    deep, other = scattered([30, 21], seed=3)
    feed(runner, [deep, other], [29, 20])
    rng = np.random.default_rng(4)
    tokens, slots = (
        ints(rng.integers(4, tiny.VOCAB, nodes)),
        ints(np.setdiff1d(np.arange(512), [*deep.slots, *other.slots])),
    )
    logits = runner.run(Packer().pack([other.chunk(1), deep.tree(tokens, told, slots[:nodes])])).logits
    worst = (logits[0] - truth(plain(family), other.ids)[-1]).abs().max().item()
    for node in range(nodes):
        path = np.concatenate([deep.ids[:29], tokens[path_to(parents, node)]])
        worst = max(worst, (logits[1 + node] - truth(plain(family), path)[-1]).abs().max().item())
    return worst


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_tree_nodes_equal_their_paths(family: str) -> None:
    parents = random_tree(np.random.default_rng(5), 37)  # more than one word of ancestors
    assert tree_error(family, make_runner(family), parents, parents) <= TOLERANCE


def test_a_tree_told_as_another_tree_is_noticed() -> None:
    parents = random_tree(np.random.default_rng(5), 37)
    chain = ints(np.arange(37) - 1)
    assert tree_error("llama", make_runner("llama"), parents, chain) > 1e-2


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_committing_a_path_copies_nothing(family: str) -> None:
    """After a tree, the context is the old slots plus the slots of the accepted nodes, wherever they lie."""
    runner, rng = make_runner(family), np.random.default_rng(6)
    (sequence,) = scattered([30], seed=7)
    feed(runner, [sequence], [30])
    parents = random_tree(rng, 12)
    tokens, spare = ints(rng.integers(4, tiny.VOCAB, 12)), ints(np.setdiff1d(np.arange(512), sequence.slots))
    runner.run(Packer().pack([sequence.tree(tokens, parents, spare[:12])]))
    path = path_to(parents, max(range(12), key=lambda node: len(path_to(parents, node))))
    assert len(path) > 2
    grown = Fed(
        np.concatenate([sequence.ids, tokens[path], ints([77])]),
        np.concatenate([sequence.slots, spare[path], spare[12:13]]),
        done=30 + len(path),
    )
    logits = runner.run(Packer().pack([grown.chunk(1)])).logits
    assert (logits[0] - truth(plain(family), grown.ids)[-1]).abs().max().item() <= TOLERANCE


@pytest.mark.parametrize(
    ("family", "dropped"),
    [*((family, "window") for family in WINDOWED), ("gemma2", "softcap"), ("gpt_oss", "sinks")],
)
def test_a_dropped_option_of_attention_is_noticed(family: str, dropped: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparisons above would fail if the hook lost a window, a soft cap or sinks."""
    runner = make_runner(family)
    attend = runner._backend.attend
    monkeypatch.setattr(type(runner._backend), "attend", lambda _, *a, **kw: attend(*a, **{**kw, dropped: None}))
    sequences = scattered([45, 33, 20], seed=1)
    run_schedule(runner, sequences, seed=2)
    assert error_of(family, sequences) > 1e-2


@pytest.mark.parametrize("wanted", [[], [0], [3, 9], list(range(10))])
def test_only_wanted_rows_reach_the_head(wanted: list[int]) -> None:
    model = tiny.loaded("qwen3")
    runner = ModelRunner(model, SlotPool(64), "reference")
    seen: list[int] = []
    model.module.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-2]))
    (sequence,) = scattered([10], seed=8, pool=64)
    segment = sequence.chunk(10)
    segment.wanted = ints(wanted)
    result = runner.run(Packer().pack([segment]))
    assert result.logits.shape == (len(wanted), runner.vocab_size)
    assert result.logits.dtype == torch.float32
    assert sum(seen) == len(wanted)
    expected = truth(plain("qwen3"), sequence.ids)[wanted]
    assert torch.allclose(result.logits, expected, atol=TOLERANCE)


def test_bfloat16_model_gives_float32_logits_near_its_own() -> None:
    module = tiny.build("llama").bfloat16()
    model = tiny.loaded("llama", module)
    model.dtype = torch.bfloat16
    runner = ModelRunner(model, SlotPool(64), "reference")
    (sequence,) = scattered([20], seed=9, pool=64)
    logits = runner.run(Packer().pack([sequence.chunk(20)])).logits
    assert logits.dtype == torch.float32
    reference = truth(tiny.build("llama", "eager").bfloat16(), sequence.ids)
    assert (logits - reference).abs().mean().item() < 0.03


@pytest.mark.parametrize(
    "raised",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: tried 9 bytes"),
        MemoryError("Unable to allocate 9 bytes"),
    ],
)
def test_out_of_memory_is_named_and_the_runner_lives(raised: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = make_runner("llama")
    (sequence,) = scattered([5], seed=10)
    batch = Packer().pack([sequence.chunk(5)])
    with monkeypatch.context() as patch:
        patch.setattr(type(runner._backend), "attend", lambda *_, **__: (_ for _ in ()).throw(raised))
        with pytest.raises(OutOfMemory, match="5 tokens over 0 context tokens"):
            runner.run(batch)
    assert runner.run(batch).logits.shape == (5, tiny.VOCAB)


def test_other_errors_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = make_runner("llama")
    (sequence,) = scattered([5], seed=10)
    monkeypatch.setattr(type(runner._backend), "attend", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        runner.run(Packer().pack([sequence.chunk(5)]))


def test_a_model_that_goes_around_the_hook_is_refused() -> None:
    runner = make_runner("llama")
    layer = runner._forward._anatomy.layers[1]  # type: ignore[union-attr]
    layer.forward = lambda hidden, **_: hidden
    (sequence,) = scattered([5], seed=10)
    with pytest.raises(UnsupportedModel, match="2 of 3 layers"):
        runner.run(Packer().pack([sequence.chunk(5)]))


def test_a_held_model_says_how_to_get_it_back() -> None:
    model = tiny.loaded("llama")
    ModelRunner(model, SlotPool(64), "reference")
    ids = torch.arange(4, 12)[None]
    with pytest.raises(RuntimeError, match="set_attn_implementation"):
        model.module(ids)
    model.module.set_attn_implementation("eager")
    assert torch.allclose(model.module(ids).logits, plain("llama")(ids).logits)


def test_planes_belong_to_the_pool() -> None:
    pool = SlotPool(40)
    runner = ModelRunner(tiny.loaded("gemma2"), pool, "reference")
    assert sorted(pool.planes) == sorted(f"{kind}.{layer}" for kind in "kv" for layer in range(4))
    assert pool.plane("k.0").shape == (40, 2, 16)
    assert runner.attention == "reference"


def test_unknown_attention_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="'fast'"):
        make_runner("llama", "fast")


def test_bundled_model_decodes_what_transformers_generates() -> None:
    """Greedy, token by token, from a prompt in two chunks."""
    model, count = load("bundled", device="cpu"), 24
    prompt = torch.arange(300, 340)[None]
    with torch.inference_mode():
        expected = model.module.generate(prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False)[0, 40:]
    runner = ModelRunner(model, SlotPool(128), "reference")
    sequence = scattered([40 + count], seed=11, pool=128)[0]
    sequence.ids[:40] = prompt[0].numpy()
    feed(runner, [sequence], [25])
    feed(runner, [sequence], [15])
    for at in range(40, 40 + count):
        row = sequence.logits[-1][-1].clone()
        row[list(model.card.stop_ids)] = -torch.inf
        sequence.ids[at] = int(row.argmax())
        feed(runner, [sequence], [1])
    assert sequence.ids[40:].tolist() == expected.tolist()
