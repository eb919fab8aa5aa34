"""K and V as int8: what rounding may cost, what it must not depend on, and that every owner of slots keeps the scales in step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import tiny
from tests.models.attention_cases import brute_force, build, worst
from tests.models.packing import TOLERANCE, Fed, feed, ints, path_to, random_tree, scattered, truth

from headrace.core.batch import Packer
from headrace.core.errors import InvalidRequest
from headrace.models import budget
from headrace.models.cache import planes
from headrace.models.cache.slots import SlotPool
from headrace.models.runner import ModelRunner

FAMILIES = ["llama", "qwen3", "gemma2", "gpt_oss"]
COARSE = 0.35  # what int8 K and V may move a logit of a tiny random model, whose logits are of size 1 to 10


def coded_runner(family: str, attention: str = "reference", slots: int = 512) -> tuple[ModelRunner, SlotPool]:
    pool = SlotPool(slots)
    return ModelRunner(tiny.loaded(family), pool, attention, kv_cache_dtype="int8"), pool


def schedule(runner: ModelRunner, sequences: list[Fed], seed: int) -> list[torch.Tensor]:
    rng = np.random.default_rng(seed)
    while any(s.done < len(s.ids) for s in sequences):
        counts = [int(c) for c in rng.choice([0, 1, 1, 3, 17], len(sequences))]
        if any(c and s.done < len(s.ids) for c, s in zip(counts, sequences, strict=True)):
            feed(runner, sequences, counts)
    return [torch.cat(s.logits) for s in sequences]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 1 << 32), st.sampled_from([1, 8, 64, 80]), st.floats(-20, 20))
def test_codes_are_within_half_a_step(seed: int, dim: int, magnitude: float) -> None:
    x = torch.randn(7, 3, dim, generator=torch.Generator().manual_seed(seed)) * 2.0**magnitude
    codes, scales = planes.encode(x)
    assert codes.dtype == torch.int8
    assert codes.abs().amax(-1).eq(planes.TOP).all()  # the largest of a row uses the whole range
    error = (planes.decode(codes, scales) - x).abs()
    assert (error <= scales.unsqueeze(-1) * 0.5001).all()
    wrong = (planes.decode(codes, scales * 1.02) - x).abs()
    assert (wrong > scales.unsqueeze(-1) * 0.5001).any()


def test_rows_of_nothing_and_of_next_to_nothing() -> None:
    x = torch.stack([torch.zeros(16), torch.full((16,), 1e-38), torch.full((16,), -3e38)])
    codes, scales = planes.encode(x)
    assert planes.decode(codes, scales).isfinite().all()
    assert codes[0].eq(0).all()
    assert codes[2].eq(-127).all()


def test_half_precision_is_coded_from_float32() -> None:
    x = torch.randn(5, 2, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert all(torch.equal(a, b) for a, b in zip(planes.encode(x), planes.encode(x.float()), strict=True))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1 << 32))
def test_attention_error_against_unrounded_planes_is_bounded(seed: int) -> None:
    """The bound from the definition: scores move by at most |q|_1 * half a step of K, values by half a step of V."""
    case = build(np.random.default_rng(seed), [("decode", 40, 1), ("tree", 30, 9)], dims=(32, 32))
    (k, k_scale), (v, v_scale) = planes.encode(case.k), planes.encode(case.v)
    coded = replace(case, k=k, v=v, scales=(k_scale, v_scale))
    moved = case.q.abs().sum(-1).max() * case.scale * k_scale.max() / 2
    bound = v_scale.max() / 2 + case.v.abs().max() * (torch.exp(2 * moved) - 1)
    error = worst(brute_force(coded).float(), brute_force(case))
    assert 0 < error <= bound.item()
    assert error < 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_near_those_of_float_planes(family: str) -> None:
    """By the median over rows: an expert's choice that tips moves a row much further."""
    runner, pool = coded_runner(family)
    sequences = scattered([46, 33, 20], seed=1)
    expected = [truth(tiny.build(family, "eager"), s.ids) for s in sequences]
    last, sequences[0].ids = sequences[0].ids[-1:], sequences[0].ids[:45]
    found = schedule(runner, sequences, seed=2)
    off = torch.cat([(a - b[: len(a)]).abs().amax(1) for a, b in zip(found, expected, strict=True)])
    assert TOLERANCE < off.median() < COARSE
    sequences[0].ids = np.concatenate([sequences[0].ids, last])
    errors = []
    for factor in (1, 5):  # negative control: with the scales of every other slot wrong, the last row is far off
        for kind in ("k_scale", "v_scale"):
            pool.plane(f"{kind}.1")[::2] *= factor
        sequences[0].done = 45
        feed(runner, [sequences[0]], [1])
        errors.append((sequences[0].logits[-1][0] - expected[0][-1]).abs().max())
    assert errors[1] > 3 * errors[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["reference", "numba"])
def test_chunks_and_company_do_not_matter(family: str, attention: str) -> None:
    """However a sequence is cut and whoever is beside it, its tokens get the same codes and logits."""
    runner, pool = coded_runner(family, attention)
    first = schedule(runner, sequences := scattered([45, 33, 20], seed=1), seed=2)
    codes = {name: plane[torch.from_numpy(sequences[0].slots).long()] for name, plane in pool.planes.items()}
    other, pool = coded_runner(family, "reference")
    (alone,) = scattered([45, 33, 20], seed=1)[:1]
    feed(other, [alone], [45])
    assert (alone.logits[0] - first[0]).abs().max() < 50 * TOLERANCE  # a code at a rounding boundary may tip
    for name, plane in pool.planes.items():
        again = plane[torch.from_numpy(alone.slots).long()].float()
        assert (again - codes[name].float()).abs().max() <= 1


@pytest.mark.parametrize("family", FAMILIES)
def test_tree_nodes_equal_their_paths(family: str) -> None:
    parents = random_tree(np.random.default_rng(5), 37)
    runner, _ = coded_runner(family, "auto")
    (deep,) = scattered([30], seed=3)
    feed(runner, [deep], [29])
    tokens = ints(np.random.default_rng(4).integers(4, tiny.VOCAB, 37))
    spare = ints(np.setdiff1d(np.arange(512), deep.slots))
    logits = runner.run(Packer().pack([deep.tree(tokens, parents, spare[:37])])).logits
    for node in (0, 17, 36):
        path = path_to(parents, node)
        other, _ = coded_runner(family)
        alone = Fed(np.concatenate([deep.ids[:29], tokens[path]]), ints(np.arange(29 + len(path))))
        feed(other, [alone], [29])
        feed(other, [alone], [len(path)])
        assert (logits[node] - alone.logits[1][-1]).abs().max() < 50 * TOLERANCE


def test_a_reused_prefix_is_read_with_its_scales() -> None:
    """A second sequence over the first one's slots gets what it would get on its own."""
    runner, pool = coded_runner("qwen3")
    (first,) = scattered([40], seed=8)
    feed(runner, [first], [32])
    rest = ints(np.random.default_rng(9).integers(4, tiny.VOCAB, 8))
    spare = ints(np.setdiff1d(np.arange(512), first.slots))[:8]
    twin = Fed(np.concatenate([first.ids[:32], rest]), np.concatenate([first.slots[:32], spare]), done=32)
    feed(runner, [twin], [8])
    other, _ = coded_runner("qwen3")
    alone = Fed(twin.ids, ints(np.arange(40)))
    feed(other, [alone], [32])
    feed(other, [alone], [8])
    assert torch.equal(twin.logits[0], alone.logits[1])
    pool.plane("k_scale.0")[torch.from_numpy(first.slots[:32]).long()] *= 2
    broken = Fed(twin.ids, twin.slots, done=32)
    feed(runner, [broken], [8])
    assert (broken.logits[0] - alone.logits[1]).abs().max() > 1e-2


def test_remap_moves_codes_and_scales() -> None:
    runner, pool = coded_runner("llama", slots=64)
    slots = pool.take(40)
    sequence = Fed(scattered([31], seed=7)[0].ids, slots[:31])
    feed(runner, [sequence], [30])
    moved = Fed(sequence.ids, slots[::-1][:31].copy(), done=30)
    pool.remap(sequence.slots[:30], moved.slots[:30])
    feed(runner, [moved], [1])
    other, _ = coded_runner("llama", slots=64)
    alone = Fed(sequence.ids, ints(np.arange(31)))
    feed(other, [alone], [30])
    feed(other, [alone], [1])
    assert torch.equal(moved.logits[0], alone.logits[1])


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_slot_bytes_are_what_the_planes_take(family: str) -> None:
    runner, pool = coded_runner(family, slots=10)
    taken = sum(plane.numel() * plane.element_size() for plane in pool.planes.values())
    assert budget.slot_bytes(tiny.loaded(family), "int8") * 10 == taken
    assert runner.kv_cache_dtype == "int8"


def test_the_same_memory_holds_more_tokens() -> None:
    model = tiny.loaded("llama")
    model.config.head_dim = 64
    ratio = budget.kv_slots(model, 0.5, 512, "int8") / budget.kv_slots(model, 0.5, 512)
    assert 3.75 < ratio < 3.77  # 4 * 64 bytes become 64 and a scale of 4


def test_an_unknown_kind_names_the_choices() -> None:
    with pytest.raises(InvalidRequest, match="'fp8': give one of auto, int8") as caught:
        ModelRunner(tiny.loaded("llama"), SlotPool(8), kv_cache_dtype="fp8")
    assert caught.value.field == "kv_cache_dtype"
