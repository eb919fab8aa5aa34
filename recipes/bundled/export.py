"""Write a checkpoint as the folder `transformers` loads: bf16 safetensors, configs, tokenizer, chat template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from .budget import load_checkpoint
from .model import ModelConfig, config_from
from .tokenizer import special_ids

TARGET_LIMIT = 25_000_000  # bytes of model.safetensors
DRAFT_LIMIT = 3_000_000
COST_RATIO = 8  # the draft reads at most 1/8 of the target's weights a token
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def generation_config(special: dict[str, int]) -> dict[str, object]:
    """`generation_config.json`: generation ends at the end of the text or of the turn."""
    return {
        "bos_token_id": special["bos"],
        "eos_token_id": [special["eos"], special["end"]],
        "pad_token_id": special["pad"],
        "do_sample": False,
    }


def write_model(weights: dict[str, Tensor], shape: ModelConfig, tokenizer: Path, folder: Path) -> int:
    """Write every file of a model folder and return the size of the weights in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    narrow = {name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in weights.items()}
    partial = folder / "model.safetensors.partial"
    save_file(narrow, str(partial), metadata={"format": "pt"})
    partial.chmod(0o644)
    partial.replace(folder / "model.safetensors")  # a reader that has the old file mapped keeps it
    special = special_ids(Tokenizer.from_file(str(tokenizer / "tokenizer.json")))
    for name, content in (
        ("config.json", shape.to_hf(special)),
        ("generation_config.json", generation_config(special)),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for name in TOKENIZER_FILES:
        shutil.copyfile(tokenizer / name, folder / name)
    return (folder / "model.safetensors").stat().st_size


def export_model(checkpoint: Path, tokenizer: Path, folder: Path) -> ModelConfig:
    """Export one checkpoint; its shape is returned."""
    saved = load_checkpoint(checkpoint)
    if saved is None:
        raise FileNotFoundError(f"no checkpoint at {checkpoint}")
    shape = config_from(saved["shape"])
    write_model(saved["model"], shape, tokenizer, folder)
    return shape


def check_pair(target: ModelConfig, draft: ModelConfig, folder: Path) -> None:
    """The limits the pair promises: sizes on disk and the draft's cost a token."""
    for name, limit in (("target", TARGET_LIMIT), ("draft", DRAFT_LIMIT)):
        size = (folder / name / "model.safetensors").stat().st_size
        if size > limit:
            raise ValueError(f"{name} weights take {size} bytes, more than {limit}")
    if draft.weights_per_token() * COST_RATIO > target.weights_per_token():
        raise ValueError(f"the draft reads more than 1/{COST_RATIO} of the target's weights a token")


def export_pair(work: Path, folder: Path) -> None:
    """Write `folder/target` and `folder/draft` and check them."""
    target = export_model(work / "target.pt", work / "tokenizer", folder / "target")
    draft = export_model(work / "draft.pt", work / "tokenizer", folder / "draft")
    check_pair(target, draft, folder)
