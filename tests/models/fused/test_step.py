"""The native step against the checkpoint's modules: every family, every kind of batch, every split, whatever the threads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests import tiny
from tests.models.packing import TOLERANCE, ints, random_tree, scattered
from torch import nn

from headrace.core.batch import Packer, Segment
from headrace.models.cache.slots import SlotPool
from headrace.models.fused.linear import choose_linears
from headrace.models.fused.modules import FusedAttention
from headrace.models.fused.stack import NativeStack
from headrace.models.hook import Step
from headrace.models.runner import ModelRunner
from headrace.native import build

pytestmark = pytest.mark.skipif(not build.available(), reason=f"no compiler: {build.why_not()}")

MIXTURES = {"qwen3_moe", "mixtral", "gpt_oss"}
"""Families whose layers have no single MLP: only embedding and head are native."""
NATIVE = [family for family in tiny.FAMILIES if family not in MIXTURES]
SLOTS = 512


def make(family: str, mode: str = "native", module: nn.Module | None = None, **options: Any) -> ModelRunner:
    model = tiny.loaded(family, module)
    choose_linears(model, mode)
    return ModelRunner(model, SlotPool(SLOTS), "numba", **options)


def stack_of(runner: ModelRunner) -> NativeStack:
    forward = runner._forward
    assert isinstance(forward, NativeStack)
    return forward


def script(seed: int = 1) -> list[list[Segment]]:
    """Steps that mix prompts, chunks, single tokens and trees; segments of a step belong to different sequences."""
    rng = np.random.default_rng(seed)
    long, short, other, tail = scattered([60, 9, 33, 24], seed)
    steps = [[long.chunk(40), short.chunk(8)], [long.chunk(1), other.chunk(20), short.chunk(1)]]
    parents = random_tree(rng, 7)
    tokens = ints(rng.integers(4, tiny.VOCAB, 7))
    free = ints([slot for slot in range(SLOTS) if slot not in {*long.slots, *short.slots, *other.slots, *tail.slots}])
    steps.append([long.tree(tokens, parents, free[:7]), other.chunk(1)])
    steps.append([long.chunk(3), other.chunk(12), tail.chunk(24)])
    steps.append([long.chunk(1), tail.chunk(0), other.tree(tokens[:3], parents[:3], free[7:10])])
    return [[segment for segment in step if len(segment.tokens)] for step in steps]


def run(runner: ModelRunner, steps: list[list[Segment]]) -> list[torch.Tensor]:
    return [runner.run(Packer().pack(step)).logits for step in steps]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_agrees_with_the_modules_on_every_kind_of_batch(family: str) -> None:
    runner = make(family)
    assert stack_of(runner).native_layers == ([] if family in MIXTURES else list(range(stack_of(runner).depth)))
    for found, expected in zip(run(runner, script()), run(make(family, "module"), script()), strict=True):
        assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max().clamp_min(1.0)
        assert torch.equal(found.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("family", ["llama", "gemma3", "granite"])
def test_rows_do_not_depend_on_their_batch_or_the_threads(family: str) -> None:
    steps = script()
    together = run(make(family), steps)
    alone = make(family)
    for segments, logits in zip(steps, together, strict=True):
        parts = logits.split([len(segment.wanted) for segment in segments])
        for segment, part in zip(segments, parts, strict=True):
            assert torch.equal(alone.run(Packer().pack([segment])).logits, part)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for one, three in zip(together, run(make(family), steps), strict=True):
            assert torch.equal(one, three)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_long_chunks_leave_the_region_for_attention(family: str) -> None:
    """From 128 rows over 512 keys on, plain attention is torch's; a capped one stays in the kernel."""
    config = {"native": make(family), "module": make(family, "module")}
    found = {}
    for mode, runner in config.items():
        (sequence,) = scattered([500], seed=4)
        first, second = sequence.chunk(370), sequence.chunk(130)
        second.wanted = ints([0, 129])
        found[mode] = run(runner, [[first], [second]])
    for native, module in zip(found["native"], found["module"], strict=True):
        assert (native - module).abs().max() <= TOLERANCE * module.abs().max().clamp_min(1.0)


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_moe"])
def test_split_anywhere_equals_the_whole(family: str) -> None:
    steps, runner = script(), make(family)
    stack = stack_of(runner)
    for segments in steps:
        batch = Packer().pack(segments)
        expected = runner.run(batch).logits
        ids, positions = torch.from_numpy(batch.ids), torch.from_numpy(batch.positions)
        for cut in range(stack.depth + 1):
            step = step_of(runner, batch)
            with torch.inference_mode():
                first = stack.layers(stack.embed(ids, positions), 0, cut, step)
                second = stack.layers(stack.resume(first.hidden, positions), cut, stack.depth, step)
                assert torch.equal(stack.head(second.hidden[0])[batch.head_rows], expected)


def step_of(runner: ModelRunner, batch: Any) -> Step:
    return Step(
        runner._backend,
        runner._backend.prepare(batch, torch.device("cpu")),
        runner._planes.keys,
        runner._planes.values,
        torch.from_numpy(batch.write_slots).long(),
        runner._planes.scales,
    )


def test_layers_of_both_kinds_alternate() -> None:
    module = tiny.build("llama")
    layer = module.model.layers[1]
    layer.mlp.act_fn = nn.Tanh()
    reference = tiny.build("llama")
    reference.model.layers[1].mlp.act_fn = nn.Tanh()
    runner = make("llama", module=module)
    assert stack_of(runner).native_layers == [0, 2]
    for found, expected in zip(run(runner, script()), run(make("llama", "module", reference), script()), strict=True):
        assert (found - expected).abs().max() <= TOLERANCE


def test_int8_slots_agree_with_the_modules() -> None:
    native, module = make("llama", kv_cache_dtype="int8"), make("llama", "module", kv_cache_dtype="int8")
    exact = run(make("llama"), script())
    for found, expected, float32 in zip(run(native, script()), run(module, script()), exact, strict=True):
        assert (found - expected).abs().max() <= 2e-2 * expected.abs().max()
        assert not torch.equal(found, float32)


def test_logits_are_the_callers_to_keep() -> None:
    runner, steps = make("llama"), script()
    first = runner.run(Packer().pack(steps[0])).logits
    kept = first.clone()
    run(runner, steps[1:])
    assert torch.equal(first, kept)


class _Louder(nn.Module):
    """A layer that does one thing more than its parts."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        for name, child in layer.named_children():
            self.add_module(name, child)
        self._run = type(layer).forward

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        found: torch.Tensor = self._run(self, hidden_states, **kwargs)
        return found * 1.001


def test_a_layer_that_does_anything_else_is_kept() -> None:
    module = tiny.build("llama")
    module.model.layers[1] = _Louder(module.model.layers[1])
    assert stack_of(make("llama", module=module)).native_layers == [0, 2]


def test_a_hooked_layer_is_kept() -> None:
    module = tiny.build("llama")
    seen: list[int] = []
    module.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    runner = make("llama", module=module)
    assert stack_of(runner).native_layers == [1, 2]
    run(runner, script()[:1])
    assert seen


def test_a_wrong_rotary_layout_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = tiny.build("llama")
    model = tiny.loaded("llama", module)
    choose_linears(model, "native")
    attention = module.model.layers[2].self_attn
    assert isinstance(attention, FusedAttention)
    assert attention.rotary == "halves"
    from headrace.models.fused import step as native_step

    def mispaired(struct: Any, layer: Any, describe: Any = native_step._describe) -> None:
        describe(struct, layer)
        struct.interleaved = layer.attention is attention

    monkeypatch.setattr(native_step, "_describe", mispaired)
    assert stack_of(ModelRunner(model, SlotPool(SLOTS), "numba")).native_layers == [0, 1]


def test_positions_beyond_the_tables() -> None:
    config = tiny.config("llama")
    config.max_position_embeddings = 20_000
    import transformers

    torch.manual_seed(0)
    module = transformers.LlamaForCausalLM(config).eval()
    tokens, slots = ints([5, 6, 7]), ints([3, 1, 2])
    far = Segment(0, tokens, ints([9000, 9001, 9002]), slots, slots[:0], ints([0, 1, 2]))
    found, expected = (run(make("llama", mode, module), [[far]])[0] for mode in ("module", "native"))
    assert (found - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("wrong", [tiny.VOCAB, 10**8, -1])
def test_ids_without_an_embedding_are_refused_rather_than_read(wrong: int) -> None:
    runner, slots = make("llama"), ints([3, 1, 2])
    segment = Segment(0, ints([5, wrong, 7]), ints([0, 1, 2]), slots, slots[:0], ints([2]))
    with pytest.raises(IndexError, match=f"the embedding has rows 0 to {tiny.VOCAB - 1}"):
        runner.run(Packer().pack([segment]))
    segment = Segment(0, ints([5, 6, 7]), ints([0, 1, 2]), slots, slots[:0], ints([2]))
    assert torch.isfinite(runner.run(Packer().pack([segment])).logits).all()


def test_other_attention_takes_the_modules() -> None:
    model = tiny.loaded("llama")
    choose_linears(model, "native")
    assert not isinstance(ModelRunner(model, SlotPool(SLOTS), "reference")._forward, NativeStack)


def test_an_empty_want_gives_no_logits() -> None:
    (sequence,) = scattered([8], seed=2)
    chunk = sequence.chunk(8)
    chunk.wanted = ints([])
    assert make("llama").run(Packer().pack([chunk])).logits.shape == (0, tiny.VOCAB)


def test_compiled_code_is_found_again() -> None:
    """What it encloses must not differ from process to process, else each would compile anew and keep one more copy."""
    from headrace.models.attention.prepare import compile_prepare

    compile_prepare(cache=True)
    again = compile_prepare(cache=True)
    assert sum(again.stats.cache_hits.values()) == 1
    assert not again.stats.cache_misses


@pytest.mark.parametrize("prefix", ["Glm", "Glm4", "Ernie4_5", "Arcee", "Olmo3", "Helium"])
def test_interleaved_and_partial_rotation_plain_mlps_and_other_places_of_norms(prefix: str) -> None:
    import transformers

    config = getattr(transformers, f"{prefix}Config")(**tiny._BASE)
    torch.manual_seed(0)
    module = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    expected = run(make(prefix, "module", module), script())
    runner = make(prefix, "native", module)
    assert stack_of(runner).native_layers == [0, 1, 2]
    for found, want in zip(run(runner, script()), expected, strict=True):
        assert (found - want).abs().max() <= TOLERANCE * want.abs().max().clamp_min(1.0)
