"""Padded checkpoints compute what the small model computes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from headrace.bench import make_model
from headrace.bench.checkpoints import padding, shapes
from headrace.bench.checkpoints.shapes import Shape
from headrace.core.errors import InvalidRequest
from headrace.models.checkpoints.hub import resolve

# Wider heads, other groups, more layers and vocabulary, an inexact score factor; then the least that differs.
WIDE = Shape(384, 1024, 9, 12, 4, 128, 8200, True)
UNTIED = dataclasses.replace(WIDE, tie_word_embeddings=False, vocab_size=8192, head_dim=64)
FOURFOLD = Shape(320, 1024, 6, 10, 5, 256, 8200, True)


def _logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return module(ids).logits[0]


@pytest.fixture(scope="module")
def small() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(5, 8000, (1, 40), generator=torch.Generator().manual_seed(1))
    return ids, _logits(resolve("bundled"), ids)


@pytest.mark.parametrize("shape", [WIDE, UNTIED, FOURFOLD], ids=["wide", "untied", "fourfold"])
def test_padded_logits_are_the_small_models(
    shape: Shape, small: tuple[torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    ids, expected = small
    padding.pad(resolve("bundled"), tmp_path, shape)
    found = _logits(tmp_path, ids)
    real, added = found[:, :8192], found[:, 8192:]
    # A constant shared by all real tokens changes no probability.
    assert (real.log_softmax(-1) - expected.log_softmax(-1)).abs().max() < 1e-3
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    assert added.numel() == 0 or added.max() < expected.min() - 50
    assert sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tmp_path).parameters()) == shape.parameters


def test_the_norms_epsilon_matters(small: tuple[torch.Tensor, torch.Tensor], tmp_path: Path) -> None:
    """Negative control: with the small model's own epsilon the comparison above would fail."""
    ids, expected = small
    padding.pad(resolve("bundled"), tmp_path, WIDE)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-2}))
    found = _logits(tmp_path, ids)[:, :8192]
    assert (found.log_softmax(-1) - expected.log_softmax(-1)).abs().max() > 1e-3


def test_old_layers_are_spread_in_order() -> None:
    old = Shape(8, 8, 6, 1, 1, 8, 8, True)
    for count in (6, 7, 12, 24, 25):
        new = dataclasses.replace(old, num_hidden_layers=count)
        made = padding.Padding(old, new, 1e-5, 0.0, 0.0)
        assert [i for i in map(made.layer_of, range(count)) if i is not None] == list(range(6))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"hidden_size": 128}, "hidden_size"),
        ({"num_hidden_layers": 5}, "num_hidden_layers"),
        ({"head_dim": 96}, "heads"),
        ({"num_key_value_heads": 12}, "heads"),
        ({"hidden_size": 256}, "wider"),
    ],
)
def test_impossible_shapes_are_refused(change: dict[str, int], word: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=word):
        padding.pad(resolve("bundled"), tmp_path, dataclasses.replace(WIDE, **change))
    assert not list(tmp_path.iterdir())


def test_unknown_size_and_writing_over_the_model(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="choose one of"):
        make_model.make("7t", tmp_path)
    with pytest.raises(InvalidRequest, match="another folder"):
        make_model.make("20m", resolve("bundled"))


def test_shards_load(small: tuple[torch.Tensor, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, expected = small
    monkeypatch.setattr(shapes, "SHARD_BYTES", 4 << 20)
    (tmp_path / "model-00009-of-00009.safetensors").write_text("left from before")
    padding.pad(resolve("bundled"), tmp_path, FOURFOLD)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(_logits(tmp_path, ids).argmax(-1), expected.argmax(-1))


def test_claims_follow_from_rows() -> None:
    rows = [{"case": "tokens", "prompt": i, "equal": 8 - (i == 3), "of": 8} for i in range(4)]
    for ms, name in ((11.0, "padded"), (10.0, "random")):
        rows += [{"case": "step", "system": name, "batch": 1, "turn": t, "ms": ms} for t in range(3)]
    assert make_model.claims(rows) == {"identical_answers_rate": 0.75, "step_cost_vs_random_b1": 1.1}


def test_verify_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = dataclasses.replace(FOURFOLD, intermediate_size=800)
    monkeypatch.setitem(shapes.SHAPES, "tiny", tiny)
    make_model.make("tiny", tmp_path)
    result = make_model.verify(tmp_path, "tiny", prompts=3, new=6, turns=1, report=lambda line: None)
    assert result.claims["identical_answers_rate"] == 1.0
    assert result.claims["step_cost_vs_random_b8"] > 0
