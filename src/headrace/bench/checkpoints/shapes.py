"""Sizes of decoders people run, and sharded checkpoints written a tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.core.errors import InvalidRequest

if TYPE_CHECKING:
    from torch import Tensor

SHARD_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama's sizes, under transformers' names."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool

    @classmethod
    def of(cls, config: dict[str, Any]) -> Shape:
        """The sizes that a ``config.json`` states."""
        heads = config["num_attention_heads"]
        full = {"num_key_value_heads": heads, "head_dim": config["hidden_size"] // heads, **config}
        return cls(**{name: full[name] for name in cls.__slots__})

    def config(self) -> dict[str, Any]:
        """The fields as ``config.json`` has them."""
        return asdict(self)

    @property
    def parameters(self) -> int:
        """Weights, an LM head tied to the embedding counted once."""
        heads = (2 * self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim
        layer = self.hidden_size * (heads + 3 * self.intermediate_size + 2)
        table = self.vocab_size * self.hidden_size
        return self.num_hidden_layers * layer + table * (1 if self.tie_word_embeddings else 2) + self.hidden_size


# 20m and 125m are ours; the others have the sizes of SmolLM2-360M, Qwen2.5-0.5B, Llama-3.2-1B and Llama-3.1-8B.
SHAPES = {
    "20m": Shape(384, 1024, 6, 6, 2, 64, 16_000, False),
    "125m": Shape(768, 2048, 12, 12, 4, 64, 32_000, False),
    "0.3b": Shape(960, 2560, 32, 15, 5, 64, 49_152, True),
    "0.5b": Shape(896, 4864, 24, 14, 2, 64, 151_936, True),
    "1b": Shape(2048, 8192, 16, 32, 8, 64, 128_256, True),
    "8b": Shape(4096, 14_336, 32, 32, 8, 128, 128_256, False),
}


def shape_named(name: str) -> Shape:
    """The shape ``name``; raises :class:`InvalidRequest` where there is none."""
    if name not in SHAPES:
        raise InvalidRequest(f"shape is {name!r}: choose one of {', '.join(SHAPES)}", field="like")
    return SHAPES[name]


def write_checkpoint(folder: Path, config: dict[str, Any], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write ``config.json`` and safetensors shards of at most about 1 GiB, never holding more than one in memory.

    Raises:
        InvalidRequest: when the folder cannot be written.
    """
    from safetensors.torch import save_file

    shards: list[tuple[Path, list[str]]] = []
    total = 0

    def flush(part: dict[str, Tensor]) -> None:
        path = folder / f"part-{len(shards)}.safetensors"
        save_file(part, path, metadata={"format": "pt"})
        shards.append((path, list(part)))
        part.clear()

    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in (*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")):
            stale.unlink()
        part: dict[str, Tensor] = {}
        held = 0
        for name, tensor in tensors:
            if part and held + tensor.nbytes > SHARD_BYTES:
                flush(part)
                held = 0
            part[name] = tensor.contiguous()
            held += tensor.nbytes
            total += tensor.nbytes
        flush(part)
        _name_shards(folder, shards, total)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise InvalidRequest(f"cannot write {folder}: {error.strerror}; choose another --out", field="out") from error


def _name_shards(folder: Path, shards: list[tuple[Path, list[str]]], total: int) -> None:
    """Give the shards the names transformers looks for."""
    if len(shards) == 1:
        shards[0][0].rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, (path, names) in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        path.rename(folder / name)
        weight_map |= dict.fromkeys(names, name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
