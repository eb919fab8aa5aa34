"""From a model's name to a folder on disk: bundled, local or from the Hugging Face hub."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

from headrace.core.errors import ModelNotFound

BUNDLED = {"bundled": "target", "bundled-draft": "draft"}

# What a checkpoint needs and nothing else: no pickles, no other frameworks' weights, no second copy of the weights.
_WANTED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model"]
_UNWANTED = ["*/*", "consolidated*.safetensors", "*.bin.index.json"]


def resolve(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Path:
    """The folder of model ``name``.

    Args:
        name: "bundled" or "bundled-draft" for the pair that ships with headrace, a local folder, or a hub name as in ``owner/model``;
            a hub model is downloaded once (safetensors, JSON and tokenizer files only) and then found in the hub's cache.
        revision: branch, tag or commit on the hub.
        trust_remote_code: fetch the checkpoint's Python files too.

    Raises:
        ModelNotFound: nothing of that name exists or can be reached; the message says what to do.
    """
    if name in BUNDLED:
        folder = Path(str(files("headrace.models") / "bundled" / BUNDLED[name]))
        if not (folder / "config.json").is_file():
            raise ModelNotFound(
                f"the bundled model is missing from this installation ({folder}): reinstall headrace, or name another model",
                field="model",
            )
        return folder
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return folder
    if folder.is_file():
        raise ModelNotFound(f"{name} is a file: give the folder that holds config.json and the weights", field="model")
    if not _could_be_on_hub(name):
        raise ModelNotFound(
            f"no model folder {name!r}: check the path, or give a hub name such as Qwen/Qwen3-0.6B, or bundled",
            field="model",
        )
    return _from_hub(name, revision, trust_remote_code)


def _could_be_on_hub(name: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) is not None


def _from_hub(name: str, revision: str | None, trust_remote_code: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    wanted = [*_WANTED, "*.py"] if trust_remote_code else _WANTED
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=_UNWANTED))
    except GatedRepoError as error:
        raise ModelNotFound(
            f"{name} is gated on the hub: accept its terms there, then log in with `hf auth login`", field="model"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelNotFound(f"{name} has no revision {revision} on the hub", field="revision") from error
    except RepositoryNotFoundError as error:
        raise ModelNotFound(
            f"no local folder and no hub model is called {name}: check the spelling, or log in with `hf auth login` "
            "if it is private",
            field="model",
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ModelNotFound(
            f"{name} is not a local folder, is not in the hub's cache, and the hub cannot be reached: go online, download it "
            "elsewhere and give its folder, or use the model bundled",
            field="model",
        ) from error
