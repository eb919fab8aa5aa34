"""From texts to token streams on disk, and from streams to batches that can be resumed exactly.

A stream is one `uint16` array a source: documents in a seeded order, each closed by the end-of-text token. A batch row
is a window of `length + 1` tokens. Windows of a source are visited in a fresh permutation every pass, so no text is
seen twice before all of it was seen once; a cursor of (source, length) is the whole state of the reader.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from .chat import conversations
from .sources import load_pairs, load_texts, split_held_out
from .tokenizer import END_OF_TEXT, render, sample, save, train_tokenizer

CHAT = "chat"


def encode(tokenizer: Tokenizer, documents: Iterable[str]) -> NDArray[np.uint16]:
    """Documents as one stream, each followed by the end-of-text token."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    parts: list[NDArray[np.uint16]] = []
    group: list[str] = []

    def flush() -> None:
        parts.extend(np.asarray([*row.ids, end], dtype=np.uint16) for row in tokenizer.encode_batch_fast(group))
        group.clear()

    for document in documents:
        group.append(document)
        if len(group) >= 64:
            flush()
    flush()
    return np.concatenate(parts) if parts else np.zeros(0, np.uint16)


def prepare(data: Path, work: Path, config: dict[str, Any]) -> None:
    """Write the tokenizer, a train and a held-out stream a source, and `streams.json` with their sizes; once."""
    if (work / "streams.json").exists():
        return
    seed, sizes = config["seed"], config["tokenizer"]
    folder = work / "streams"
    folder.mkdir(parents=True, exist_ok=True)
    splits = {name: split_held_out(documents) for name, documents in load_texts(data).items()}
    train = {name: part[0] for name, part in splits.items()}
    held = {name: part[1] for name, part in splits.items()}
    talks = conversations(train, load_pairs(data), seed)
    train[CHAT], held[CHAT] = split_held_out([render(talk) for talk in talks])
    tokenizer = train_tokenizer(sample(train, sizes["sample_bytes"]), sizes["vocab_size"])
    save(tokenizer, work / "tokenizer")
    report: dict[str, dict[str, int]] = {}
    for name, documents in train.items():
        random.Random(f"{seed}/{name}").shuffle(documents)
        stream, test = encode(tokenizer, documents), encode(tokenizer, held[name])
        np.save(folder / f"{name}.train.npy", stream)
        np.save(folder / f"{name}.held.npy", test)
        report[name] = {
            "train_tokens": len(stream),
            "train_bytes": sum(len(d.encode()) for d in documents),
            "held_tokens": len(test),
            "held_bytes": sum(len(d.encode()) for d in held[name]),
        }
    (work / "streams.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def stream_report(work: Path) -> dict[str, dict[str, int]]:
    """Sizes of the prepared streams."""
    report: dict[str, dict[str, int]] = json.loads((work / "streams.json").read_text(encoding="utf-8"))
    return report


class Reader:
    """Draws batches from the train streams; `state` and `restore` make it resumable."""

    def __init__(self, work: Path, seed: int) -> None:
        self.streams = {
            path.name.removesuffix(".train.npy"): np.load(path, mmap_mode="r")
            for path in sorted((work / "streams").glob("*.train.npy"))
        }
        self.seed = seed
        self.cursors: dict[str, int] = {}
        self.orders: dict[str, tuple[int, NDArray[np.int64]]] = {}
        self.rng = random.Random(seed)

    def state(self) -> dict[str, object]:
        """Everything the next batch depends on."""
        return {"cursors": dict(self.cursors), "rng": self.rng.getstate()}

    def restore(self, state: dict[str, object]) -> None:
        """Continue exactly where `state` was taken."""
        cursors = state["cursors"]
        assert isinstance(cursors, dict)
        self.cursors = dict(cursors)
        self.rng.setstate(state["rng"])  # type: ignore[arg-type]

    def window(self, name: str, length: int) -> NDArray[np.int64]:
        """The next unseen window of `length + 1` tokens of a source."""
        stream = self.streams[name]
        count = max(1, (len(stream) - 1) // length)
        lane = f"{name}/{length}"
        drawn = self.cursors.get(lane, 0)
        self.cursors[lane] = drawn + 1
        turn, index = divmod(drawn, count)
        if lane not in self.orders or self.orders[lane][0] != turn:
            digest = np.random.SeedSequence([self.seed, turn, length, *name.encode()])
            self.orders[lane] = (turn, np.random.default_rng(digest).permutation(count))
        start = int(self.orders[lane][1][index]) * length
        window = np.asarray(stream[start : start + length + 1], dtype=np.int64)
        return np.resize(window, length + 1)

    def batch(self, mix: Mapping[str, float], rows: int, length: int) -> torch.Tensor:
        """Token ids [rows, length + 1]; every row comes from one source, drawn with the shares of `mix`."""
        names = [name for name in mix if name in self.streams]
        chosen = self.rng.choices(names, weights=[mix[name] for name in names], k=rows)
        return torch.from_numpy(np.stack([self.window(name, length) for name in chosen]))
