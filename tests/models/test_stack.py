"""The layer stack against the whole forward of each family, split at every layer boundary."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests import tiny
from tests.models.packing import TOLERANCE, scattered, truth

from headrace.core.batch import Packer
from headrace.core.errors import UnsupportedModel
from headrace.models.attention import get_backend
from headrace.models.families import kv_shape
from headrace.models.hook import Step, install
from headrace.models.stack import LayerStack, WholeForward, forward_of


def make_step(module: torch.nn.Module, length: int, seed: int) -> tuple[Step, torch.Tensor, torch.Tensor]:
    """A step that prefills one random sequence, with its ids and positions."""
    install(module)
    depth, heads, size = kv_shape(module.config)
    (sequence,) = scattered([length], seed, pool=length)
    batch = Packer().pack([sequence.chunk(length)])
    backend = get_backend("reference", "cpu")
    planes = [[torch.zeros(length, heads, size) for _ in range(depth)] for _ in "kv"]
    step = Step(
        backend,
        backend.prepare(batch, torch.device("cpu")),
        *planes,
        write_slots=torch.from_numpy(batch.write_slots).long(),
    )
    return step, torch.from_numpy(batch.ids), torch.from_numpy(batch.positions)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_split_anywhere_equals_the_whole_forward(family: str) -> None:
    module = tiny.build(family)
    step, ids, positions = make_step(module, 40, seed=1)
    expected = truth(tiny.build(family, "eager"), ids.numpy())
    stack = LayerStack(module)
    with torch.inference_mode():
        for cut in range(stack.depth + 1):
            first = stack.layers(stack.embed(ids, positions), 0, cut, step)
            second = stack.layers(stack.resume(first.hidden, positions), cut, stack.depth, step)
            logits = stack.head(second.hidden[0])
            assert logits.dtype == torch.float32
            assert (logits - expected).abs().max().item() <= TOLERANCE, f"cut before layer {cut}"
            assert torch.equal(logits.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_whole_forward_agrees_with_the_stack(family: str) -> None:
    module = tiny.build(family)
    step, ids, positions = make_step(module, 40, seed=2)
    rows = torch.tensor([3, 39])
    with torch.inference_mode():
        stacked = LayerStack(module).logits(ids, positions, rows, step)
        whole = WholeForward(module).logits(ids, positions, rows, step)
    assert (stacked - whole).abs().max().item() <= TOLERANCE


def test_skipping_a_layer_is_noticed() -> None:
    module = tiny.build("llama")
    step, ids, positions = make_step(module, 40, seed=1)
    stack = LayerStack(module)
    with torch.inference_mode():
        logits = stack.head(stack.layers(stack.embed(ids, positions), 1, stack.depth, step).hidden[0])
    assert (logits - truth(tiny.build("llama", "eager"), ids.numpy())).abs().max().item() > 1e-2


def gpt2() -> torch.nn.Module:
    import transformers

    config = transformers.GPT2Config(
        vocab_size=tiny.VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config).eval()


def test_a_family_outside_the_table_runs_whole() -> None:
    module = gpt2()
    (sequence,) = scattered([30], seed=3, pool=30)
    expected = truth(module, sequence.ids)
    step, ids, positions = make_step(module, 30, seed=3)
    forward = forward_of(module)
    assert isinstance(forward, WholeForward)
    with torch.inference_mode():
        logits = forward.logits(ids, positions, None, step)
    assert np.array_equal(ids.numpy(), sequence.ids)
    assert (logits - expected).abs().max().item() <= TOLERANCE


def test_a_family_outside_the_table_has_no_stack() -> None:
    with pytest.raises(UnsupportedModel, match="GPT2LMHeadModel"):
        LayerStack(gpt2())


def test_a_forward_without_positions_is_refused() -> None:
    class Blind(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return input_ids

    with pytest.raises(UnsupportedModel, match="position_ids"):
        WholeForward(Blind())
