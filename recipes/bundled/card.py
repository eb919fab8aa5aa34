"""The model card of the bundled pair, made from its measurements and the table of sources."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .budget import load_checkpoint
from .data import stream_report
from .export import check_pair
from .model import ModelConfig, config_from
from .sources import attributions

INTRODUCTION = """\
A small target and a much smaller draft, trained from nothing by the recipe in `recipes/bundled` on two CPU cores, on text that may be
redistributed. Both are plain `LlamaForCausalLM` checkpoints in bfloat16 with one tokenizer of {entries} byte-level entries and one
chat template (system, user, assistant).
"""

LENGTHS = """\
The draft reads {ratio} of the target's weights for a token, LM head included. Most training rows were 256 or 512 tokens long; the last
eighth of the target's time had 1024 and then 2048, the end of the draft's 1024. Positions go to 2048. The schedule follows the clock:
how many tokens fit depends on what else the machine does, so a rerun gives a similar pair and not the same one.
"""

METHOD = """\
`python -m recipes.bundled --data DATA --work WORK`: a BPE tokenizer; next-token training with Muon and AdamW at a constant rate and
then a linear decay, during which the share of instruction pairs rises; a draft distilled from the target's distribution on the same
text and on text the target wrote; this card. `recipes/bundled/README.md` says more.
"""

MEASURED = """\
Held-out documents were never trained on (`chat` is held out by conversation; its passages may occur in the training text). The last
three columns are about the draft on the target's own continuations of held-out text. *greedy*: share of greedily generated tokens that
are the draft's first choice. *sampled*: expected share accepted at temperature 1. *of 4*: greedy tokens accepted of four drafted in
a chain.
"""

NOTICES = """\
- **OpenStax** (CC BY 4.0): *Principles of Economics*, *College Success* and *Introduction to Business*, by their authors,
  published by OpenStax, Rice University; access for free at openstax.org. Changes: mark-up, figures and exercises' structure
  dropped, quotes made plain, text tokenised, section titles turned into requests. OpenStax endorses nothing here.
- **Python standard library**: Copyright (c) 2001 Python Software Foundation; All Rights Reserved. Used under the PSF License
  Agreement version 2. Changes: tests, tools and character tables left out, functions turned into request and answer pairs.
- **ELTeC-eng** (European Literary Text Collection, COST Action CA16204): novels in the public domain, mark-up CC BY 4.0.
  Changes: mark-up dropped, quotes made plain.
- **The Rust Programming Language** (MIT or Apache-2.0, used under Apache-2.0), **Python Enhancement Proposals** (public domain or
  CC0), **GSM8K** (MIT, Copyright (c) 2021 OpenAI), **MT-bench** questions and references (Apache-2.0), **Self-Instruct** seed tasks
  (Apache-2.0), **char-rnn**'s copy of Shakespeare (MIT; the plays are in the public domain), NLTK's copies of United States
  presidential addresses (public domain).
"""

LIMITS = """\
These are test-sized models. They write grammatical, locally coherent English and code that looks like Python, and they know almost
nothing: facts, arithmetic and answers are mostly wrong, and long texts drift or repeat. They exist so that a server can be run,
tested and measured with nothing downloaded; use a real checkpoint for anything else. Novels of 1840 to 1920 and old speeches
are a large part of the text and carry the attitudes of their time. No filtering for safety was done.
"""


def _table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _shape_row(name: str, shape: ModelConfig, run: dict[str, float]) -> list[str]:
    """One model's row of the first table."""
    return [
        name,
        f"{shape.parameters():,}",
        str(shape.layers),
        str(shape.hidden_size),
        str(shape.intermediate_size),
        f"{shape.heads} / {shape.kv_heads} x {shape.head_dim}",
        f"{run['tokens'] / 1e6:.1f} M",
        f"{run['steps']:,}",
        f"{run['minutes']:.0f}",
    ]


def _fenced(text: str) -> str:
    """A sample as an indented block, so that fences inside it do no harm."""
    return "\n".join("    " + line for line in text.splitlines())


def _numbers(result: dict[str, Any], work: Path) -> str:
    """Held-out loss and acceptance by source."""
    report, bits, draft = stream_report(work), result["bits_per_byte"]["target"], result["bits_per_byte"]["draft"]
    agree = result["acceptance"]
    rows = [
        [
            name,
            f"{sizes['train_tokens'] / 1e6:.2f} M",
            f"{sizes['held_bytes'] / 1e3:.0f} kB",
            f"{bits[name]:.3f}",
            f"{draft[name]:.3f}",
            *(f"{agree[name][key]:.2f}" if name in agree else "-" for key in ("greedy", "sampled", "chain4")),
        ]
        for name, sizes in report.items()
    ]
    rows.append(["mean", "", "", "", "", *(f"{agree['all'][key]:.2f}" for key in ("greedy", "sampled", "chain4"))])
    head = [
        "source",
        "tokens there are",
        "held out",
        "target bits/byte",
        "draft bits/byte",
        "greedy",
        "sampled",
        "of 4",
    ]
    return _table(head, rows)


def card_text(data: Path, work: Path, shapes: dict[str, ModelConfig], result: dict[str, Any]) -> str:
    """The whole card."""
    runs = result["runs"]
    head = [
        "model",
        "parameters",
        "layers",
        "width",
        "feed-forward",
        "heads / kv x width",
        "tokens",
        "steps",
        "minutes",
    ]
    ratio = shapes["target"].weights_per_token() / shapes["draft"].weights_per_token()
    samples = "\n\n".join(
        f"**{sample['kind']}**: {sample['prompt'].strip()}\n\n{_fenced(sample['answer'])}"
        for sample in result["samples"]
    )
    sections = [
        "# The bundled pair",
        INTRODUCTION.format(entries=shapes["target"].vocab_size).strip(),
        _table(head, [_shape_row(name, shapes[name], runs[name]) for name in ("target", "draft")]),
        LENGTHS.format(ratio=f"1/{ratio:.1f}").strip(),
        "## How it was made",
        METHOD.strip(),
        "## Measured",
        MEASURED.strip(),
        _numbers(result, work),
        "## Samples\n\nTemperature 0.6, top-p 0.95, first try, at most 140 tokens.",
        samples,
        "## Limits",
        LIMITS.strip(),
        "## Sources and licences",
        _table(["name", "origin", "licence"], [list(row) for row in attributions(data)]),
        NOTICES.strip(),
    ]
    return "\n\n".join(sections) + "\n"


def write_card(data: Path, work: Path, folder: Path) -> str:
    """Write `folder/README.md` from `work/evaluation.json` and the checkpoints; returns the text."""
    result = json.loads((work / "evaluation.json").read_text(encoding="utf-8"))
    shapes = {}
    for name in ("target", "draft"):
        saved = load_checkpoint(work / f"{name}.pt")
        if saved is None:
            raise FileNotFoundError(f"no checkpoint of the {name} in {work}")
        shapes[name] = config_from(saved["shape"])
    check_pair(shapes["target"], shapes["draft"], folder)
    text = card_text(data, work, shapes, result)
    (folder / "README.md").write_text(text, encoding="utf-8")
    return text
