"""Loading a checkpoint: found, checked, memory-mapped and placed."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from headrace.core.errors import InvalidRequest
from headrace.core.protocols import ModelCard
from headrace.models import budget, families, probe, rope
from headrace.models.checkpoints import checks as checkpoint
from headrace.models.checkpoints import hub, prequantised, support
from headrace.models.loaded import LoadedModel
from headrace.models.parallel.sharing import Sharing

if TYPE_CHECKING:
    from headrace.models.parallel.group import Group

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: bool = True,
    revision: str | None = None,
    max_context: int | None = None,
    group: Group | None = None,
) -> LoadedModel:
    """Find, check and load a model.

    Args:
        name: as for :func:`headrace.models.checkpoints.hub.resolve`.
        dtype: "auto", "float32", "bfloat16" or "float16". "auto" is float32 on the CPU: without bfloat16 units, which most CPUs lack,
            half precision is converted back and forth around every product and loses both time and accuracy. On a GPU it is
            bfloat16, or float16 where the GPU has no bfloat16.
        device: "auto" (a GPU where there is one), "cpu", "cuda" or "cuda:0".
        trust_remote_code: run Python code that comes with the checkpoint.
        progress: show a bar while weights load, on a terminal.
        revision: branch, tag or commit on the hub.
        max_context: tokens the model will be used with at most; None for all it was made for. It matters only to models whose rotary
            positions depend on it, see :mod:`headrace.models.rope`.
        group: the ranks that share the model, joined before; each loads its part (:mod:`headrace.models.parallel`).

    Raises:
        ModelNotFound: nothing of that name.
        BrokenCheckpoint: its files are missing, truncated, misshapen or unsafe.
        UnsupportedModel: its architecture does not run here.
        InvalidRequest: an unknown dtype or device, or a model that ``group`` cannot share evenly.
        OutOfMemory: its weights do not fit the device.
    """
    place = _device(device)
    precision = _dtype(dtype, place)
    path = hub.resolve(name, revision=revision, trust_remote_code=trust_remote_code)
    plan = _inspect(name, path, precision, place, group, trust_remote_code)
    module = _read(plan, precision, place, progress=progress)
    context = rope.settle(module, max_context)
    card = ModelCard(
        name=name,
        path=str(path),
        context=context,
        vocab_size=int(module.get_output_embeddings().weight.shape[0]),
        stop_ids=stop_ids(path, plan.config),
        created=int((path / "config.json").stat().st_mtime),
        dtype=str(precision).removeprefix("torch."),
        parameters=plan.size if plan.stored else sum(parameter.numel() for parameter in module.parameters()),
        quantization=plan.stored.method if plan.stored else "",
    )
    config = plan.config if plan.shared is None else plan.shared.settle(module)
    model = LoadedModel(module, config, path, card, precision, place)
    if families.anatomy(module) is None:
        probe.verify(model)
    return model


@dataclass(frozen=True)
class _Plan:
    """A checkpoint that passed every check that needs no weights.

    Attributes:
        path: its folder.
        kind: the class of transformers that runs it.
        config: the configuration of its text decoder.
        names: how its tensors are renamed while they are read; empty for not at all.
        size: parameters of the whole model.
        stored: how its maker quantised it; None for not at all.
        shared: the part of it that this rank holds; None for all of it.
    """

    path: Path
    kind: Any
    config: Any
    names: dict[str, str]
    size: int
    stored: prequantised.Stored | None
    shared: Sharing | None


def _inspect(
    name: str, path: Path, precision: torch.dtype, place: torch.device, group: Group | None, trust_remote_code: bool
) -> _Plan:
    """What is to be loaded, and whether it can be: refuses all that can be refused before any weight is read."""
    whole = checkpoint.read_config(path, trust_remote_code=trust_remote_code)
    kind, config = support.check_supported(whole, str(path) if trust_remote_code else None)
    names = {} if config is whole else support.TEXT_KEYS
    checkpoint.check_tokenizer(path)
    with _quiet(False):
        stored = prequantised.settle(name, whole, config, place, alone=group is None)
    wanted = checkpoint.parameter_shapes(kind, config)
    shapes = checkpoint.read_shapes(path) if stored is None else checkpoint.float_shapes(path)
    checkpoint.check_shapes(path, checkpoint.renamed(shapes, names), wanted)
    shared = None if group is None else Sharing.of(name, kind, config, wanted, group, place)
    size = sum(map(math.prod, wanted.values()))
    held = size if stored is None or stored.widened else checkpoint.weight_bytes(path) // precision.itemsize
    budget.check_weights(name, held // (shared.parts if shared else 1), precision, place)
    return _Plan(path, kind, config, names, size, stored, shared)


def _read(plan: _Plan, precision: torch.dtype, place: torch.device, *, progress: bool) -> Any:
    """The module with its weights, where it belongs and without gradients."""
    stored, shared = plan.stored, plan.shared
    with _quiet(progress), contextlib.nullcontext() if shared is None else shared.environment():
        module, info = plan.kind.from_pretrained(
            plan.path,
            config=plan.config,
            dtype=precision,
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # reported by check_loaded, with the remedy
            output_loading_info=True,
            **({"key_mapping": plan.names} if plan.names else {}),
            **(shared.options() if shared else {}),
            **(stored.options(place) if stored else {}),
        )
    checkpoint.check_loaded(plan.path, info)
    if stored is None or stored.widened:
        module = module.to(place)  # the others were put there, and many must not be moved
    module = module.eval().requires_grad_(False)
    prequantised.release(module, stored)
    return module


def stop_ids(path: Path, config: Any) -> tuple[int, ...]:
    """Ids that end generation: the generation configuration's, else the configuration's, else the tokenizer's end-of-text."""
    found: list[int] = []
    with contextlib.suppress(OSError, ValueError):
        found = _ids(json.loads((path / "generation_config.json").read_text(encoding="utf-8")).get("eos_token_id"))
    found = found or _ids(getattr(config, "eos_token_id", None)) or _tokenizer_eos(path)
    return tuple(dict.fromkeys(found))


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list | tuple) else [value]
    return [int(v) for v in values if isinstance(v, int) and v >= 0]


def _tokenizer_eos(path: Path) -> list[int]:
    with contextlib.suppress(OSError, ValueError, KeyError, AttributeError):
        text = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))["eos_token"]
        text = text["content"] if isinstance(text, dict) else text
        added = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
        return [int(entry["id"]) for entry in added if entry["content"] == text]
    return []


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InvalidRequest(f"device is {name!r}: choose auto, cpu, cuda or cuda:N", field="device")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise InvalidRequest(
                f"device is {name!r}, but torch {torch.__version__} sees {count} CUDA devices here: choose cpu, or install "
                "a CUDA build of torch and its driver",
                field="device",
            )
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if name not in _DTYPES:
        raise InvalidRequest(f"dtype is {name!r}: choose auto, {', '.join(_DTYPES)}", field="dtype")
    return _DTYPES[name]


@contextlib.contextmanager
def _quiet(progress: bool) -> Iterator[None]:
    """transformers' own bar on a terminal only, and its load report not at all: what it says is checked and raised."""
    from transformers.utils import logging as untyped

    logging: Any = untyped
    bar = progress and sys.stderr.isatty()
    had_bar, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    (logging.enable_progress_bar if bar else logging.disable_progress_bar)()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        (logging.enable_progress_bar if had_bar else logging.disable_progress_bar)()
