"""Names to folders: bundled, local, hub, and what is said when there is nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from headrace.core.errors import ModelNotFound
from headrace.models.checkpoints import hub


@pytest.mark.parametrize(("name", "folder"), [("bundled", "target"), ("bundled-draft", "draft")])
def test_bundled_names(name: str, folder: str) -> None:
    found = hub.resolve(name)
    assert found.name == folder
    assert (found / "config.json").is_file()


def test_missing_bundle_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(hub.BUNDLED, "bundled", "nowhere")
    with pytest.raises(ModelNotFound, match="reinstall headrace"):
        hub.resolve("bundled")


def test_local_folder_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("owner/model") == Path("owner/model")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.resolve("~/owner") == tmp_path / "owner"


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelNotFound, match="is a file"):
        hub.resolve(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize("name", ["./nope", "/nope/at/all", "~/nope", "a/b/c", "", "a b", "../x", "-x/y", "own/er?"])
def test_what_cannot_be_on_the_hub_is_never_asked_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(ModelNotFound, match="check the path"):
        hub.resolve(name)


def test_offline_and_not_cached() -> None:
    with pytest.raises(ModelNotFound, match=r"some-owner/some-model .* use the model bundled"):
        hub.resolve("some-owner/some-model")


@pytest.mark.parametrize("trust", [False, True])
def test_only_safe_files_are_fetched(trust: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.resolve("owner/model", revision="abc", trust_remote_code=trust) == tmp_path
    assert (asked["name"], asked["revision"]) == ("owner/model", "abc")
    filtered = list(
        huggingface_hub.utils.filter_repo_objects(
            [
                "model.safetensors",
                "config.json",
                "tokenizer.model",
                "chat_template.jinja",
                "merges.txt",
                "pytorch_model.bin",
                "model.pt",
                "modeling_x.py",
                "onnx/model.safetensors",
                "consolidated.safetensors",
                "flax_model.msgpack",
            ],
            allow_patterns=asked["allow_patterns"],
            ignore_patterns=asked["ignore_patterns"],
        )
    )
    expected = ["model.safetensors", "config.json", "tokenizer.model", "chat_template.jinja", "merges.txt"]
    assert filtered == ([*expected, "modeling_x.py"] if trust else expected)


class _Response:
    """The little of an HTTP response that hub errors look at."""

    status_code = 404
    headers: dict[str, str] = {}  # noqa: RUF012
    request = None


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (errors.GatedRepoError, "accept its terms"),
        (errors.RepositoryNotFoundError, "check the spelling"),
        (errors.RevisionNotFoundError, "no revision v9"),
        (errors.HfHubHTTPError, "cannot be reached"),
        (ConnectionError, "cannot be reached"),
    ],
)
def test_hub_errors_name_the_remedy(kind: type[Exception], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error = kind("no") if kind is ConnectionError else kind("no", response=_Response())  # type: ignore[call-arg]

    def download(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ModelNotFound, match=says):
        hub.resolve("owner/model", revision="v9")
