"""Loading from a folder, and one clear error for each way a checkpoint can be broken."""

from __future__ import annotations

import json
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import tiny

from headrace.core.errors import BrokenCheckpoint, HeadraceError, InvalidRequest, OutOfMemory, UnsupportedModel
from headrace.models import families, probe
from headrace.models.load import load, stop_ids
from headrace.models.loaded import LoadedModel


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint("llama", tmp_path_factory.mktemp("good") / "tiny-llama")


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "tiny-llama"))


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit(file: Path, **changes: object) -> None:
    data = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in {**data, **changes}.items() if value is not None}))


def shard(folder: Path) -> list[str]:
    """Split the single file into two shards with an index; returns their names."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    for shard_name, half in zip(shards, halves, strict=True):
        save_file({name: tensors[name] for name in half}, folder / shard_name, metadata={"format": "pt"})
    mapping = {name: shard_name for shard_name, half in zip(shards, halves, strict=True) for name in half}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": mapping}))
    (folder / "model.safetensors").unlink()
    return shards


def test_loads_what_was_saved(good: Path) -> None:
    model = load(str(good), device="cpu")
    assert model.dtype == torch.float32
    assert model.device == torch.device("cpu")
    assert model.path == good
    assert not model.module.training
    assert not any(p.requires_grad for p in model.module.parameters())
    card = model.card
    assert (card.context, card.vocab_size, card.stop_ids) == (tiny.CONTEXT, tiny.VOCAB, (tiny.EOS, tiny.IM_END))
    assert card.parameters == tiny.model("llama").num_parameters()
    assert (card.name, card.dtype) == (str(good), "float32")
    assert card.created > 0
    ids = torch.arange(4, 24)[None]
    assert torch.equal(model.module(ids).logits, tiny.model("llama")(ids).logits)


@pytest.mark.parametrize("family", ["gemma2", "qwen3_moe", "mixtral", "gpt_oss"])
def test_families_survive_disk(family: str, tmp_path: Path) -> None:
    """Tied heads and experts that are merged while loading."""
    module = load(str(tiny.checkpoint(family, tmp_path)), device="cpu").module
    ids = torch.arange(4, 24)[None]
    with torch.no_grad():
        assert torch.allclose(module(ids).logits, tiny.model(family)(ids).logits, atol=1e-5)


def test_loads_shards(folder: Path) -> None:
    shard(folder)
    ids = torch.arange(4, 24)[None]
    with torch.no_grad():
        assert torch.equal(load(str(folder), device="cpu").module(ids).logits, tiny.model("llama")(ids).logits)


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_dtype_is_obeyed(good: Path, name: str, dtype: torch.dtype) -> None:
    model = load(str(good), dtype=name, device="cpu")
    assert {p.dtype for p in model.module.parameters()} == {dtype}
    assert model.card.dtype == name


def test_saved_half_precision_becomes_float32_on_the_cpu(folder: Path) -> None:
    rewrite(folder / "model.safetensors", lambda t: t.update({name: v.bfloat16() for name, v in t.items()}))
    edit(folder / "config.json", dtype="bfloat16")
    assert {p.dtype for p in load(str(folder), device="cpu").module.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"dtype": "int3"}, "dtype"),
        ({"device": "tpu"}, "device"),
        ({"device": "mps"}, "device"),
        ({"max_context": 513}, "max_context"),
    ],
)
def test_bad_options_are_named(good: Path, options: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        load(str(good), **options)  # type: ignore[arg-type]
    assert caught.value.field == field
    assert str(next(iter(options.values()))) in caught.value.message


def test_absent_gpu_is_named(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InvalidRequest, match="sees 0 CUDA devices"):
        load(str(good), device="cuda:0")


def test_too_big_is_said_before_loading(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.models.budget._free_bytes", lambda _: 1000)
    with pytest.raises(OutOfMemory, match="for its weights in bfloat16"):
        load(str(good), device="cpu", dtype="bfloat16")


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def cut_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def html(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"<!doctype html><title>404</title>" * 20)


def garbage_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 16) + b"not json at all!" + bytes(64))


def list_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"[]" + bytes(64))


def appended(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as stream:
        stream.write(b"junk")


def wrong_shape(folder: Path) -> None:
    rewrite(folder / "model.safetensors", lambda t: t.update({"model.norm.weight": torch.zeros(65)}))


def other_config(folder: Path) -> None:
    edit(folder / "config.json", intermediate_size=112)


def missing_tensor(folder: Path) -> None:
    rewrite(folder / "model.safetensors", lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))


def more_layers(folder: Path) -> None:
    edit(folder / "config.json", num_hidden_layers=5)


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"a": torch.zeros(1)}, folder / "pytorch_model.bin")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama", ')


def config_is_a_list(folder: Path) -> None:
    (folder / "config.json").write_text("[1]")


def no_model_type(folder: Path) -> None:
    (folder / "config.json").write_text('{"hidden_size": 64}')


def missing_shard(folder: Path) -> None:
    (folder / shard(folder)[1]).unlink()


def escaping_shard(folder: Path) -> None:
    (folder.parent / "outside.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def empty_index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("{}")


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (truncate, "model.safetensors should be"),
        (cut_header, "header should be"),
        (empty, "is 0 bytes long"),
        (html, "header should be"),
        (garbage_header, "no safetensors header"),
        (list_header, "no safetensors header"),
        (appended, "should be"),
        (wrong_shape, r"model.norm.weight is \[65\] instead of \[64\]"),
        (other_config, r"mlp\.\w+_proj.weight is .* and \d+ more"),
        (missing_tensor, "model.layers.1.mlp.up_proj.weight is missing"),
        (more_layers, r"model.layers.3.\S+ is missing.*more"),
        (only_pickle, r"pytorch_model.bin.*from_pretrained and save_pretrained"),
        (no_weights, "has no weights"),
        (no_tokenizer, "has no tokenizer"),
        (no_config, "has no config.json"),
        (broken_config, "not readable JSON"),
        (config_is_a_list, "no JSON object"),
        (no_model_type, "names no model_type"),
        (missing_shard, "lacks model-00002-of-00002.safetensors of the 2 weight files"),
        (escaping_shard, "lacks ../outside.safetensors"),
        (empty_index, "has no weight_map"),
    ],
)
def test_broken_checkpoints_each_have_their_error(break_it: Callable[[Path], None], says: str, folder: Path) -> None:
    break_it(folder)
    with pytest.raises(BrokenCheckpoint, match=says) as caught:
        load(str(folder), device="cpu")
    assert caught.value.field == "model"
    assert str(folder) in caught.value.message
    assert ": " in caught.value.message, "a remedy follows"


def test_a_missing_expert_is_noticed(tmp_path: Path) -> None:
    """Experts are merged while loading, so no header shape is wrong by itself."""
    folder = tiny.checkpoint("qwen3_moe", tmp_path)
    rewrite(folder / "model.safetensors", lambda t: t.pop("model.layers.0.mlp.experts.2.down_proj.weight"))
    with pytest.raises(BrokenCheckpoint, match=r"experts.down_proj is \[3, 64, 48\] instead of \[4, 64, 48\]"):
        load(str(folder), device="cpu")


def test_spare_tensors_are_let_be(folder: Path) -> None:
    rewrite(folder / "model.safetensors", lambda t: t.update({"left.over": torch.zeros(2)}))
    assert load(str(folder), device="cpu").card.vocab_size == tiny.VOCAB


def test_a_pickle_beside_safetensors_is_never_read(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04this would raise if it were unpickled")
    assert load(str(folder), device="cpu").card.vocab_size == tiny.VOCAB


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}}, "AutoModelForCausalLM.*trust_remote_code"),
        ({"quantization_config": {"quant_method": "unheard-of"}}, "quantised with unheard-of"),
        ({"model_type": "warp_drive"}, "'warp_drive'"),
        ({"model_type": "mamba"}, "mamba models are not supported"),
    ],
)
def test_unsupported_checkpoints_are_refused(changes: dict[str, object], says: str, folder: Path) -> None:
    edit(folder / "config.json", **changes)
    (folder / "modeling_evil.py").write_text("raise SystemExit('remote code ran')")
    with pytest.raises(UnsupportedModel, match=says):
        load(str(folder), device="cpu")
    assert "modeling_evil" not in sys.modules


def test_refusal_comes_before_any_weight_is_read(folder: Path) -> None:
    edit(folder / "config.json", model_type="mamba")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModel):
        load(str(folder), device="cpu")


def test_untested_family_is_checked_against_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "STACKED", frozenset())
    model = load(str(folder), device="cpu")
    ids = torch.arange(4, 24)[None]
    assert torch.allclose(model.module(ids).logits, tiny.model("llama")(ids).logits, atol=1e-5)


def test_bundled_pair_loads_and_shares_a_vocabulary() -> None:
    target, draft = load("bundled", device="cpu"), load("bundled-draft", device="cpu")
    assert target.card.vocab_size == draft.card.vocab_size
    assert target.card.stop_ids
    assert target.card.parameters > 4 * draft.card.parameters


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [([0, 3], 5, (0, 3)), (7, 5, (7,)), (None, 5, (5,)), (None, [5, 5, 6], (5, 6)), (None, None, (tiny.EOS,))],
)
def test_stop_ids_come_from_the_most_specific_source(
    folder: Path, generation: object, config: object, expected: tuple[int, ...]
) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    settings = tiny.config("llama")
    settings.eos_token_id = config
    assert stop_ids(folder, settings) == expected


def test_loading_restores_transformers_logging(good: Path) -> None:
    from transformers.utils import logging

    logging.set_verbosity_info()
    try:
        load(str(good), device="cpu")
        assert logging.get_verbosity() == logging.INFO
        assert logging.is_progress_bar_enabled()
        with pytest.raises(HeadraceError):
            load(str(good / "nowhere"), device="cpu")
    finally:
        logging.set_verbosity_warning()


REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.mark.parametrize("kind", ["own_llama", "llama"])
def test_remote_code_runs_only_when_trusted(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trusted code runs, is checked against itself even under a known type's name, and gives the same model."""
    modules = folder.parent / "modules"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(modules))
    monkeypatch.setattr(sys, "path", [*sys.path])
    (folder / "modeling_own.py").write_text(REMOTE.replace("own_llama", kind))
    auto = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    edit(folder / "config.json", model_type=kind, auto_map=auto)
    with pytest.raises(UnsupportedModel, match="trust_remote_code"):
        load(str(folder), device="cpu")
    assert not modules.exists()
    checked: list[LoadedModel] = []
    monkeypatch.setattr(probe, "verify", checked.append)
    model = load(str(folder), device="cpu", trust_remote_code=True)
    assert type(model.module).__name__ == "OwnForCausalLM"
    assert checked == [model]
    ids = torch.arange(4, 24)[None]
    assert torch.allclose(model.module(ids).logits, tiny.model("llama")(ids).logits, atol=1e-5)


def multimodal(kind: str) -> Any:
    """A tiny random image-and-text model."""
    import transformers

    towers = {
        "gemma3": ("Gemma3", "Siglip", {"mm_tokens_per_image": 4}),
        "llama": ("Llava", "CLIP", {}),
    }
    prefix, tower, more = towers[kind]
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = getattr(transformers, f"{tower}VisionConfig")(**sizes, image_size=28, patch_size=14)
    config = getattr(transformers, f"{prefix}Config")(
        text_config=tiny.config(kind).to_dict(), vision_config=vision.to_dict(), **more
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("kind", ["gemma3", "llama"])
def test_text_part_of_a_multimodal_checkpoint(kind: str, tmp_path: Path) -> None:
    whole = multimodal(kind)
    whole.save_pretrained(tmp_path)
    tiny.tokenizer(tmp_path)
    model = load(str(tmp_path), device="cpu")
    assert model.config.model_type in families.STACKED
    assert not any("vision" in name for name, _ in model.module.named_parameters())
    ids = torch.arange(4, 40)[None]
    with torch.no_grad():
        assert torch.allclose(model.module(ids).logits, whole(input_ids=ids).logits, atol=1e-5)
    rewrite(tmp_path / "model.safetensors", lambda t: t.update({"language_model.model.norm.weight": torch.zeros(65)}))
    with pytest.raises(BrokenCheckpoint, match=r"norm.weight is \[65\]"):
        load(str(tmp_path), device="cpu")
