"""Checkpoints that come quantised: those that run here give their own weights' logits, the others a refusal with a remedy."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import tiny
from torch import nn

from headrace.core.errors import BrokenCheckpoint, UnsupportedModel
from headrace.models import budget
from headrace.models.fused.linear import choose_linears
from headrace.models.load import load

IDS = torch.randint(4, tiny.VOCAB, (1, 40), generator=torch.Generator().manual_seed(0))


def logits(module: Any) -> torch.Tensor:
    with torch.inference_mode():
        out: torch.Tensor = module(IDS, use_cache=False).logits[0]
    return out


def rewrite(folder: Path, settings: dict[str, Any], narrow: Any) -> dict[str, torch.Tensor]:
    """Quantise the projections of a tiny checkpoint by ``narrow(weight)`` -> (stored, {suffix: scales}, what it stands for)."""
    tiny.tokenizer(tiny.checkpoint("llama", folder))
    kept, meant = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if not name.endswith("proj.weight"):
            kept[name] = meant[name] = weight
            continue
        kept[name], scales, meant[name] = narrow(weight)
        kept.update({f"{name}{suffix}": scale for suffix, scale in scales.items()})
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    describe(folder, settings)
    return meant


def describe(folder: Path, settings: dict[str, Any]) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": settings}))


def fp8(folder: Path) -> dict[str, torch.Tensor]:
    def narrow(weight: torch.Tensor) -> Any:
        scale = weight.abs().max() / 448
        stored = (weight / scale).to(torch.float8_e4m3fn)
        return stored, {"_scale_inv": scale.reshape(1, 1)}, stored.float() * scale

    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    return rewrite(folder, {**settings, "modules_to_not_convert": ["lm_head"]}, narrow)


def int8(folder: Path) -> dict[str, torch.Tensor]:
    def narrow(weight: torch.Tensor) -> Any:
        scale = weight.abs().amax(1, keepdim=True) / 127
        stored = (weight / scale).round().to(torch.int8)
        return stored, {"_scale": scale}, stored.float() * scale

    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    return rewrite(
        folder,
        {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        },
        narrow,
    )


def missing(*packages: str) -> bool:
    return any(importlib.util.find_spec(package) is None for package in packages)


@pytest.mark.parametrize(
    ("method", "make"),
    [
        pytest.param("fp8", fp8, marks=pytest.mark.skipif(missing("accelerate"), reason="needs accelerate")),
        pytest.param(
            "compressed-tensors",
            int8,
            marks=pytest.mark.skipif(
                missing("accelerate", "compressed_tensors", "loguru"), reason="needs compressed-tensors"
            ),
        ),
    ],
)
def test_widened_checkpoints_are_their_own_weights(method: str, make: Any, tmp_path: Path) -> None:
    meant = make(tmp_path)
    model = load(str(tmp_path), device="cpu", progress=False)
    expected = tiny.build("llama")
    exact = logits(expected)
    expected.load_state_dict(meant)
    assert model.card.quantization == method
    assert model.card.parameters == expected.num_parameters()
    assert {p.dtype for p in model.module.parameters()} == {torch.float32}
    assert (logits(model.module) - logits(expected)).abs().max() < 1e-4
    assert (logits(model.module) - exact).abs().max() > 1e-2, "the checkpoint differs from what it was made of"
    choose_linears(model, "module", "int8")  # may be rounded again
    assert type(model.module.model.layers[0].mlp.down_proj) is not nn.Linear


@pytest.mark.skipif(missing("accelerate", "bitsandbytes"), reason="needs bitsandbytes")
def test_bitsandbytes_keeps_its_own_modules(tmp_path: Path) -> None:
    import transformers

    config = tiny.config("llama")
    config.intermediate_size = 128  # blocks of 64
    torch.manual_seed(0)
    plain = transformers.LlamaForCausalLM(config).eval()
    plain.save_pretrained(tmp_path)
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    made = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=settings, device_map={"": "cpu"}
    )
    made.save_pretrained(tmp_path)
    tiny.tokenizer(tmp_path)
    model = load(str(tmp_path), device="cpu", progress=False)
    assert model.card.quantization == "bitsandbytes"
    assert model.card.parameters == plain.num_parameters()
    off = (logits(model.module) - logits(plain)).norm() / logits(plain).norm()
    assert 1e-3 < off < 0.5


@pytest.mark.skipif(missing("accelerate"), reason="needs accelerate")
def test_shapes_of_a_quantised_checkpoint_are_checked(tmp_path: Path) -> None:
    fp8(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] = weights["model.layers.0.mlp.up_proj.weight"][:90].contiguous()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BrokenCheckpoint, match=r"up_proj.weight is \[90, 64\] instead of \[96, 64\]"):
        load(str(tmp_path), device="cpu")


@pytest.mark.parametrize(
    ("method", "package"),
    [("awq", "gptqmodel"), ("gptq", "gptqmodel optimum"), ("hqq", "hqq"), ("quanto", "optimum-quanto")],
)
def test_a_missing_package_is_named(method: str, package: str, tmp_path: Path) -> None:
    if not missing({"optimum-quanto": "optimum"}.get(package, package.split()[0])):
        pytest.skip(f"{package} is installed")
    describe(tiny.tokenizer(tiny.checkpoint("llama", tmp_path)), {"quant_method": method, "bits": 4, "group_size": 128})
    with pytest.raises(
        UnsupportedModel, match=rf"quantised with {method}.*pip install {package}.*unquantised"
    ) as caught:
        load(str(tmp_path), device="cpu")
    assert caught.value.field == "model"


def test_an_unknown_method_is_refused_and_not_overlooked(tmp_path: Path) -> None:
    describe(tiny.tokenizer(tiny.checkpoint("llama", tmp_path)), {"quant_method": "newest"})
    with pytest.raises(
        UnsupportedModel, match=r"quantised with newest.*does not know the method.*quantize int8 or nf4"
    ):
        load(str(tmp_path), device="cpu")


@pytest.mark.skipif(missing("accelerate"), reason="needs accelerate")
def test_memory_is_that_of_the_widened_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fp8(tmp_path)
    asked: list[int] = []
    monkeypatch.setattr(budget, "check_weights", lambda name, parameters, dtype, device: asked.append(parameters))
    load(str(tmp_path), device="cpu", progress=False)
    assert asked == [tiny.build("llama").num_parameters()]
