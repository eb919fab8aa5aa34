"""What quantisation costs on text: the same windows read by a model as it is and in every quantised form.

Every form reads the same windows under teacher forcing, so that their differences are paired: noise of the text cancels and what
remains is the rounding.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from headrace.bench.results import Result, Rows, new_result
from headrace.core.batch import Ints
from headrace.core.errors import HeadraceError, InvalidRequest

BUILT_IN = "built-in"
OPENERS: Mapping[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}


@dataclass(frozen=True, slots=True)
class Form:
    """A way to hold a model: how weights are rounded, and how K and V are kept."""

    name: str
    quantize: str | None = None
    kv_cache_dtype: str = "auto"


PLAIN = Form("as it is")
FORMS = (
    PLAIN,
    Form("int8 K and V", None, "int8"),
    Form("int8 weights", "int8"),
    Form("int8 both", "int8", "int8"),
    Form("nf4 weights", "nf4"),
)


@dataclass(frozen=True, slots=True)
class QualityBench:
    """What to read.

    Attributes:
        model: a folder, hub name or "bundled".
        texts: files, plain or compressed; none for the text built into headrace.
        windows: taken of each file, evenly spaced.
        length: tokens of a window.
        threads: CPU threads; None for all.
    """

    model: str = "bundled"
    texts: tuple[Path, ...] = ()
    windows: int = 8
    length: int = 512
    threads: int | None = None


def run(setting: QualityBench, *, report: Callable[[str], None] = lambda text: None) -> Result:
    """Read every window with every form that can be had here.

    Raises:
        HeadraceError: the model cannot be loaded, or a file cannot be read.
    """
    from headrace.compose import default_threads
    from headrace.models.text.tokenizer import Tokenizer

    torch.set_num_threads(setting.threads or default_threads())
    load_avg = os.getloadavg()
    rows: list[dict[str, Any]] = []
    windows: list[tuple[str, Ints]] = []
    for form in FORMS:
        report(form.name)
        try:
            runner, pool, path, context = _runner(setting, form)
        except HeadraceError:
            if form is PLAIN:
                raise
            continue
        windows = windows or _windows(setting, Tokenizer(path), min(setting.length, context))
        rows += _read(form, runner, pool, windows, rows)
    for row in rows:
        row.pop("greedy", None)
    return new_result("quality", rows, claims, load_avg)


def claims(rows: Rows) -> dict[str, float]:
    """Mean differences in nats per token against the model as it is, and shares of equal likeliest tokens, over all tokens."""
    found: dict[str, float] = {}
    for form, name in (
        ("int8 K and V", "kv_int8"),
        ("int8 weights", "int8"),
        ("int8 both", "int8_both"),
        ("nf4 weights", "nf4"),
    ):
        mine = [row for row in rows if row["form"] == form]
        if not mine:
            continue
        tokens = sum(row["tokens"] for row in mine)
        found[f"{name}_nll_gap"] = sum((row["nll"] - row["nll_plain"]) * row["tokens"] for row in mine) / tokens
        found[f"{name}_same_greedy"] = sum(row["same_greedy"] * row["tokens"] for row in mine) / tokens
    return found


def spread(rows: Sequence[Mapping[str, Any]]) -> float:
    """Standard error of the mean difference in nats per token over the windows of one form."""
    gaps = [row["nll"] - row["nll_plain"] for row in rows]
    return statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else float("nan")


def _runner(setting: QualityBench, form: Form) -> tuple[Any, Any, Path, int]:
    from headrace.models.cache.slots import SlotPool
    from headrace.models.fused.linear import choose_linears
    from headrace.models.load import load
    from headrace.models.runner import ModelRunner

    model = load(setting.model, progress=False)
    choose_linears(model, "auto", form.quantize)
    length = min(setting.length, model.card.context)
    pool = SlotPool(length)
    return ModelRunner(model, pool, kv_cache_dtype=form.kv_cache_dtype), pool, model.path, length


def _read(
    form: Form, runner: Any, pool: Any, windows: Sequence[tuple[str, Ints]], plain: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Rows of a form; ``plain`` begins with those of the model as it is."""
    from headrace.models import quality

    rows = []
    for number, (text, ids) in enumerate(windows):
        found = quality.read(runner, pool, ids, seconds=float("inf"))
        greedy = found.greedy.tolist()
        base = greedy if form is PLAIN else plain[number]["greedy"]
        nll = found.losses.mean().item()
        row = {"form": form.name, "text": text, "window": number, "tokens": len(greedy), "nll": nll}
        row["nll_plain"] = nll if form is PLAIN else plain[number]["nll"]
        row["same_greedy"] = sum(a == b for a, b in zip(greedy, base, strict=True)) / len(greedy)
        rows.append(row | ({"greedy": greedy} if form is PLAIN else {}))
    return rows


def _windows(setting: QualityBench, tokenizer: Any, length: int) -> list[tuple[str, Ints]]:
    """(name, int32[length]) windows of every text, evenly spaced in its characters."""
    from headrace.models.quality import TEXT

    if not setting.texts:
        return [(BUILT_IN, np.asarray(tokenizer.encode(TEXT)[:length], np.int32))]
    found = []
    for path in setting.texts:
        text = read_text(path)
        span = 16 * length  # characters that surely hold a window's tokens
        starts = np.linspace(0, max(0, len(text) - span), setting.windows).astype(int).tolist()
        for start in starts:
            ids = tokenizer.encode(text[start : start + span])[:length]
            if len(ids) > 1:
                found.append((path.name, np.asarray(ids, np.int32)))
    if not found:
        raise InvalidRequest("the texts hold no two tokens in a row: give others with --text", field="text")
    return found


def read_text(path: Path) -> str:
    """The text of a file, unpacked where its name ends in .xz, .gz or .bz2; raises InvalidRequest."""
    try:
        with OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8") as stream:
            return str(stream.read())
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError) as error:
        raise InvalidRequest(f"--text {path} cannot be read ({error}): give a UTF-8 text", field="text") from error
