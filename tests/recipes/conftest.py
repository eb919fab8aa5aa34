"""A data folder of a few kilobytes and a configuration that trains in seconds."""

from __future__ import annotations

import gzip
import json
import lzma
import random
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes.bundled import sources
from recipes.bundled.data import prepare
from recipes.bundled.loop import Settings

WORDS = [
    "river",
    "mill",
    "wheel",
    "water",
    "stone",
    "gate",
    "flow",
    "turns",
    "quietly",
    "under",
    "the",
    "old",
    "bridge",
]
MODULE = '''
def add_{name}(left, right):
    """Return the sum of left and right, which are numbers."""
    total = left + right
    return total
'''


def passage(rng: random.Random, paragraphs: int) -> str:
    """Made-up prose."""
    lines = [" ".join(rng.choices(WORDS, k=30)).capitalize() + "." for _ in range(paragraphs)]
    return "\n\n".join(lines)


def write_data(folder: Path) -> None:
    """Every file the recipe reads, tiny, and a table in which one more file is not permitted."""
    rng = random.Random(0)
    (folder / "text").mkdir(parents=True)
    (folder / "instruct").mkdir()
    lines = ["| file | source | licence | records | may train | note |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {source.file} | someone/{source.name}: a file | CC0 of {source.name} | 9 | yes |  |"
        for source in (*sources.TEXTS, *sources.PAIRS)
    ]
    lines.append("| text/closed.txt.xz | someone/closed: a file | no licence stated | 9 | no |  |")
    (folder / "README.md").write_text("# Data\n\n" + "\n".join(lines) + "\n", encoding="utf-8")
    for name in [source.file for source in sources.TEXTS] + ["text/closed.txt.xz"]:
        documents = ["Water and its uses\n\n" + passage(rng, 12) for _ in range(6)]
        (folder / name).write_bytes(lzma.compress("\n<|endoftext|>\n".join(documents).encode()))
    records: dict[str, list[dict[str, Any]]] = {
        "gsm8k_train": [
            {"question": f"What is {n} + 1?", "answer": f"<<{n}+1={n + 1}>>{n + 1}\n#### {n + 1}"} for n in range(20)
        ],
        "mt_bench": [{"turns": ["Say yes.", "Say no."], "reference": ["Yes.", "No."]}, {"turns": ["Say nothing."]}],
        "self_instruct_seed": [{"instruction": "Name a tree.", "instances": [{"input": "", "output": "Oak."}]}] * 4,
    }
    for source in sources.PAIRS:
        text = "\n".join(json.dumps(record) for record in records[source.name])
        (folder / source.file).write_bytes(gzip.compress(text.encode()))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny data folder."""
    folder = tmp_path_factory.mktemp("recipe") / "data"
    write_data(folder)
    return folder


@pytest.fixture(scope="session")
def config() -> dict[str, Any]:
    """The recipe's configuration, shrunk."""
    text_mix = {"eltec_eng": 0.5, "python_stdlib": 0.2, "chat": 0.3}
    optimizer = {
        "muon_rate": 0.02, "adam_rate": 0.003, "warmup_steps": 2, "decay_begin": 0.5, "final_rate": 0.1,
        "weight_decay": 0.01, "clip": 1.0, "z_loss": 1e-4,
    }  # fmt: skip
    shape = {"heads": 2, "kv_heads": 1, "head_dim": 32, "max_positions": 256}
    return {
        "seed": 7,
        "tokenizer": {"vocab_size": 400, "sample_bytes": 100_000},
        "target": {"hidden_size": 64, "intermediate_size": 128, "layers": 2, **shape},
        "draft": {"hidden_size": 16, "intermediate_size": 16, "layers": 1, **shape, "heads": 1, "head_dim": 16},
        "mix": {"all": text_mix, "draft": {**text_mix, "generated": 0.3}},
        "stage": [
            {"begin": 0.0, "length": 32, "tokens": 128, "mix": "all"},
            {"begin": 0.5, "length": 64, "tokens": 128, "mix": "all"},
        ],
        "draft_stage": [{"begin": 0.0, "length": 32, "tokens": 128, "mix": "draft"}],
        "optimizer": optimizer,
        "draft_optimizer": {**optimizer, "z_loss": 0.0},
        "distill": {
            "blend": 0.9, "generate_minutes": 0.001, "rows": 4, "prompt_tokens": 8, "new_tokens": 24,
            "temperatures": [0.0, 1.0], "mix": text_mix,
        },
    }  # fmt: skip


@pytest.fixture(scope="session")
def prepared(data: Path, config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder with tokenizer and streams, made from the tiny data and a tiny standard library."""
    library, work = tmp_path_factory.mktemp("library"), tmp_path_factory.mktemp("work")
    for index in range(6):
        module = "".join(MODULE.format(name=f"{index}_{n}") for n in range(8))
        (library / f"part{index}.py").write_text(f'"""Part {index} of a library."""\n{module}', encoding="utf-8")
    (library / "test").mkdir()
    (library / "test" / "check.py").write_text("assert 'never read'\n" * 40, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "stdlib_root", lambda: library)
        prepare(data, work, config)
    return work


@pytest.fixture
def settings(prepared: Path, config: dict[str, Any], tmp_path: Path) -> Settings:
    """Eight steps in a fresh work folder that shares the prepared streams."""
    (tmp_path / "streams").mkdir()
    for path in (prepared / "streams").iterdir():
        (tmp_path / "streams" / path.name).symlink_to(path)
    (tmp_path / "tokenizer").symlink_to(prepared / "tokenizer")
    (tmp_path / "streams.json").symlink_to(prepared / "streams.json")
    return Settings(tmp_path, 1.0, config, steps=8, compiled=False)
