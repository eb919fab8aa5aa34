"""Checks on a checkpoint folder before and after its weights are read.

Only headers are read here: a safetensors file starts with the length of a JSON header, which names every tensor's dtype, shape and
byte range, so that a truncated or foreign file is told apart from a good one without touching its data.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from headrace.core.errors import BrokenCheckpoint, UnsupportedModel

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "vocab.txt", "tekken.json")
_SHOWN = 4

Shapes = dict[str, tuple[int, ...]]


def read_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The folder's ``transformers`` configuration.

    Raises:
        BrokenCheckpoint: ``config.json`` is missing or not a JSON object.
        UnsupportedModel: it asks for code of its own, or is of a type this transformers does not know.
    """
    import transformers

    file = folder / "config.json"
    if not file.is_file():
        raise BrokenCheckpoint(
            f"{folder} has no config.json: give the folder that holds config and weights", field="model"
        )
    raw = _json(file)
    if raw.get("auto_map") and not trust_remote_code:
        raise UnsupportedModel(
            f"{folder.name} comes with Python code of its own ({', '.join(sorted(raw['auto_map']))}), which is not run: "
            "read that code, then pass trust_remote_code (--trust-remote-code) if you trust it",
            field="trust_remote_code",
        )
    try:
        return transformers.AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (ValueError, KeyError) as error:
        kind = raw.get("model_type")
        if kind is None:
            raise BrokenCheckpoint(
                f"{file} names no model_type: it is no transformers checkpoint", field="model"
            ) from error
        raise UnsupportedModel(
            f"{file}: transformers {transformers.__version__} cannot read a configuration of type {kind!r} ({_first_line(error)})",
            field="model",
        ) from error


def check_tokenizer(folder: Path) -> None:
    """Raise :class:`BrokenCheckpoint` unless the folder has some tokenizer's vocabulary."""
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise BrokenCheckpoint(
            f"{folder} has no tokenizer (none of {', '.join(_TOKENIZERS)}): copy the tokenizer files of the original model there",
            field="model",
        )


def read_shapes(folder: Path) -> Shapes:
    """Shape of every tensor in the folder's safetensors files, headers checked against file lengths.

    Raises:
        BrokenCheckpoint: naming the file that is missing, truncated, unreadable or of an unsafe format.
    """
    return {name: entry["shape"] for name, entry in _entries(folder)}


def float_shapes(folder: Path) -> Shapes:
    """As :func:`read_shapes`, without integer tensors: a quantised checkpoint's have the shape of their packing."""
    return {name: entry["shape"] for name, entry in _entries(folder) if not entry["dtype"].startswith(("I", "U"))}


def weight_bytes(folder: Path) -> int:
    """Size of the weight files together."""
    return sum(file.stat().st_size for file in weight_files(folder))


def _entries(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for file in weight_files(folder):
        yield from _header(file).items()


def renamed(shapes: Shapes, patterns: Mapping[str, str]) -> Shapes:
    """``shapes`` under the names that the first matching of ``patterns`` (regular expression -> replacement) gives."""
    if not patterns:
        return shapes
    out: Shapes = {}
    for name, shape in shapes.items():
        for pattern, replacement in patterns.items():
            name, hits = re.subn(pattern, replacement, name)
            if hits:
                break
        out[name] = shape
    return out


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the checkpoint, by the index where there is one.

    Raises:
        BrokenCheckpoint: there are none, or the index names one that is missing.
    """
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    if index.is_file():
        mapping = _json(index).get("weight_map")
        if not isinstance(mapping, dict) or not mapping:
            raise BrokenCheckpoint(f"{index} has no weight_map: download it again", field="model")
        names = sorted({str(name) for name in mapping.values()})
        # A name with a folder in it could point outside of the checkpoint.
        missing = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
        if missing:
            raise BrokenCheckpoint(
                f"{folder} lacks {_some(missing)} of the {len(names)} weight files its index names: "
                "download the missing files again",
                field="model",
            )
        return [folder / name for name in names]
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        raise BrokenCheckpoint(
            f"{folder} has only pickled weights ({_some(pickles)}), which can run code when read: convert them on a machine "
            "you can lose, with transformers' from_pretrained and save_pretrained, and give the folder with the safetensors",
            field="model",
        )
    raise BrokenCheckpoint(
        f"{folder} has no weights (model.safetensors or model.safetensors.index.json): download the model again, "
        "or give a model that is published as safetensors",
        field="model",
    )


def _header(file: Path) -> dict[str, dict[str, Any]]:
    """Name -> dtype, shape and byte range of a file's tensors."""
    size = file.stat().st_size
    again = "the file is truncated or damaged: download it again"
    with file.open("rb") as stream:
        start = stream.read(8)
        if len(start) < 8:
            raise BrokenCheckpoint(f"{file} is {size} bytes long: {again}", field="model")
        (length,) = struct.unpack("<Q", start)
        if length > size - 8:
            raise BrokenCheckpoint(
                f"{file}: its header should be {length} bytes, but {size - 8} follow: {again}", field="model"
            )
        try:
            header = json.loads(stream.read(length))
            tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
            end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
            for entry in tensors.values():
                entry["shape"], entry["dtype"] = tuple(entry["shape"]), str(entry["dtype"])
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise BrokenCheckpoint(f"{file}: its header is no safetensors header: {again}", field="model") from error
    if 8 + length + end != size:
        raise BrokenCheckpoint(f"{file} should be {8 + length + end} bytes long and is {size}: {again}", field="model")
    return tensors


def parameter_shapes(model: Any, config: Any) -> Shapes:
    """Shape of every parameter that ``model`` (a class) has under ``config``, tied ones once; nothing is allocated."""
    import torch

    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in model(config).named_parameters()}


def check_shapes(folder: Path, shapes: Shapes, wanted: Shapes) -> None:
    """Compare the headers' ``shapes`` with those the configuration asks for.

    Tensors whose names differ from the module's (renamed or merged while loading) are left to :func:`check_loaded`.

    Raises:
        BrokenCheckpoint: naming the first tensors that differ.
    """
    wrong = [
        f"{name} is {list(shapes[name])} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name in shapes and shapes[name] != shape
    ]
    if wrong:
        raise BrokenCheckpoint(
            f"{folder}: config.json and the weights do not belong together, {_some(wrong, '; ')}: "
            "use both from the same download",
            field="model",
        )


def check_loaded(folder: Path, info: Mapping[str, Any]) -> None:
    """Check what transformers reports after loading: nothing missing, misshapen or failed. Spare tensors are let be.

    Raises:
        BrokenCheckpoint: naming the first tensors concerned.
    """
    problems = [
        *(f"{name} is missing" for name in sorted(info.get("missing_keys") or ())),
        *(
            f"{name} is {list(found)} instead of {list(wanted)}"
            for name, found, wanted in sorted(info.get("mismatched_keys") or ())
        ),
        *(_first_line(message) for message in info.get("error_msgs") or ()),
    ]
    if problems:
        raise BrokenCheckpoint(
            f"{folder}: the weights do not fill the model that config.json describes, {_some(problems, '; ')}: "
            "use both from the same complete download",
            field="model",
        )


def _json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise BrokenCheckpoint(
            f"{file} is not readable JSON ({_first_line(error)}): download it again", field="model"
        ) from error
    if not isinstance(data, dict):
        raise BrokenCheckpoint(f"{file} holds no JSON object: download it again", field="model")
    return data


def _some(names: Iterable[str], separator: str = ", ") -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = f"{separator}and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return separator.join(names[:_SHOWN]) + more


def _first_line(error: object) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
