from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests import tiny

from headrace.cli import models
from headrace.core.errors import BrokenCheckpoint, HeadraceError, ModelNotFound


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache."""
    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return cache


def cached(hub: Path, name: str) -> Path:
    """A tiny Llama laid out as the hub's client lays out its cache."""
    repo = hub / f"models--{name.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("a" * 40)
    return tiny.checkpoint("llama", repo / "snapshots" / ("a" * 40))


def test_the_bundled_pair_and_the_cache_are_listed(hub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cached(hub, "some/llama")
    models.models(None, as_json=True)
    listed = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert list(listed) == ["bundled", "bundled-draft", "some/llama"]
    assert listed["bundled"]["parameters"] > 1_000_000
    assert listed["some/llama"]["kind"] == "llama"
    models.models(None)
    assert "some/llama" in capsys.readouterr().out


def test_a_cache_that_was_never_made_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "nowhere"))
    assert [model.name for model in models.local_models()] == ["bundled", "bundled-draft"]


def test_a_model_is_described_from_its_configuration_and_headers(tmp_path: Path) -> None:
    folder = tiny.checkpoint("llama", tmp_path / "tiny")
    found = models.describe(str(folder))
    module = tiny.model("llama")
    assert found.supported
    assert found.architecture == "LlamaForCausalLM"
    stored = {id(p): p.numel() for p in module.parameters()}
    assert found.parameters == sum(stored.values())
    assert found.context == tiny.CONTEXT
    config = module.config
    assert found.kv_bytes_per_token["float32"] == 2 * 4 * found.layers * config.num_key_value_heads * config.head_dim
    assert found.kv_bytes_per_token["bfloat16"] * 2 == found.kv_bytes_per_token["float32"]


def test_an_unsupported_model_is_described_with_the_reason(tmp_path: Path) -> None:
    folder = tiny.checkpoint("llama", tmp_path / "tiny")
    (folder / "config.json").write_text(json.dumps({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}))
    found = models.describe(str(folder))
    assert not found.supported
    assert "state-space" in (found.problem or "")


def test_a_model_in_the_cache_is_found_by_name_and_nothing_is_downloaded(hub: Path) -> None:
    folder = cached(hub, "some/llama")
    assert models.describe("some/llama").path == str(folder)
    with pytest.raises(ModelNotFound, match="headrace serve other/llama"):
        models.describe("other/llama")


def test_a_broken_model_is_an_error_that_says_so(tmp_path: Path) -> None:
    folder = tiny.checkpoint("llama", tmp_path / "tiny")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(BrokenCheckpoint, match="truncated"):
        models.describe(str(folder))
    with pytest.raises(HeadraceError, match="no model folder"):
        models.describe("./nowhere")


def test_a_description_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models.models(str(tiny.checkpoint("llama", tmp_path / "[tiny]")))
    shown = capsys.readouterr().out
    assert "LlamaForCausalLM" in shown
    assert "[tiny]" in shown.replace("\n", "")  # a folder's brackets are no markup
    assert "supported" in shown


@pytest.mark.parametrize(
    ("count", "shown"), [(None, "?"), (950, "950"), (820_000, "820k"), (6_820_000, "6.82M"), (7_000_000_000, "7B")]
)
def test_numbers_of_parameters(count: int | None, shown: str) -> None:
    assert models._short(count) == shown


@pytest.mark.parametrize(("count", "shown"), [(12, "12 B"), (6144, "6 KiB"), (14 << 20, "14 MiB"), (3 << 30, "3 GiB")])
def test_sizes(count: int, shown: str) -> None:
    assert models._size(count) == shown
