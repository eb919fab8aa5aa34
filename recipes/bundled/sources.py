"""The texts the bundled pair may learn from, and the gate that keeps every other text out.

The data folder carries a table (`README.md`) whose column "may train" says which files may shape shipped weights.
A file is opened only through `read_source`, which looks the file up in that table first and refuses anything that is
not marked "yes". The one source outside the folder is the source code of the Python standard library.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import re
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DOCUMENT_MARK = "<|endoftext|>"
STDLIB = "python_stdlib"
STDLIB_SKIPPED = frozenset(
    (
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "encodings",
        "pydoc_data",
        "turtledemo",
        "ensurepip",
        "msilib",
        "__pycache__",
    )
)
STDLIB_SKIPPED_FILES = frozenset({"html/entities.py", "this.py", "antigravity.py", "sre_constants.py", "keyword.py"})
HELD_OUT_SHARE = 0.015
QUOTES = str.maketrans(
    {"“": '"', "”": '"', "‘": "'", "’": "'", "\u00a0": " ", "\u2009": " ", "\ufeff": None, "\r": None}
)


class NotPermitted(RuntimeError):
    """A file was asked for that the data table does not mark as trainable."""


@dataclass(frozen=True)
class Row:
    """One line of the data table."""

    file: str
    origin: str
    licence: str
    may_train: bool


@dataclass(frozen=True)
class Source:
    """A named text source and how its file is cut into documents."""

    name: str
    file: str
    kind: str  # "documents", "lines" or "pairs"


TEXTS = (
    Source("eltec_eng", "text/eltec_eng.txt.xz", "documents"),
    Source("openstax_ccby", "text/openstax_ccby.txt.xz", "documents"),
    Source("peps", "text/peps.txt.xz", "documents"),
    Source("us_speeches", "text/us_speeches.txt.xz", "documents"),
    Source("rust_book", "text/rust_book.txt.xz", "documents"),
    Source("tinyshakespeare", "text/tinyshakespeare.txt.xz", "lines"),
)
PAIRS = (
    Source("gsm8k_train", "instruct/gsm8k_train.jsonl.gz", "pairs"),
    Source("mt_bench", "instruct/mt_bench.jsonl.gz", "pairs"),
    Source("self_instruct_seed", "instruct/self_instruct_seed.jsonl.gz", "pairs"),
)


def read_table(data: Path) -> dict[str, Row]:
    """The rows of the data folder's table by file name."""
    rows: dict[str, Row] = {}
    for line in (data / "README.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|") or len(cells) < 5 or cells[0] in ("file", "---"):
            continue
        rows[cells[0]] = Row(cells[0], cells[1], cells[2], cells[4] == "yes")
    return rows


def require(table: dict[str, Row], file: str) -> Row:
    """The row of `file`, or `NotPermitted` when it is absent or not marked trainable."""
    row = table.get(file)
    if row is None or not row.may_train:
        raise NotPermitted(f"{file} is not marked as trainable in the data table")
    return row


def _open_text(path: Path) -> str:
    opener = lzma.open if path.suffix == ".xz" else gzip.open
    with opener(path, "rt", encoding="utf-8") as stream:
        return stream.read()


def clean(text: str) -> str:
    """Plain quotes, no trailing blanks, at most one blank line in a row."""
    text = text.translate(QUOTES)
    text = re.sub(r"[ \t]+\n", "\n", text)
    return re.sub(r"\n{4,}", "\n\n\n", text).strip()


def _line_documents(text: str, size: int = 8000) -> list[str]:
    """Cut a text without document marks at blank lines into pieces of about `size` characters."""
    pieces: list[str] = []
    current: list[str] = []
    held = 0
    for paragraph in text.split("\n\n"):
        current.append(paragraph)
        held += len(paragraph)
        if held >= size:
            pieces.append("\n\n".join(current))
            current, held = [], 0
    return [*pieces, "\n\n".join(current)] if current else pieces


def read_source(data: Path, source: Source) -> list[str]:
    """Documents (cleaned text) of a text source, or JSON lines of a source of pairs; permission is checked first."""
    require(read_table(data), source.file)
    text = _open_text(data / source.file)
    if source.kind == "pairs":
        return [line for line in text.splitlines() if line.strip()]
    documents = text.split(DOCUMENT_MARK) if source.kind == "documents" else _line_documents(text)
    if source.name == "rust_book":
        documents = [re.sub(r"<!--.*?-->", "", document, flags=re.DOTALL) for document in documents]
    return [cleaned for cleaned in map(clean, documents) if len(cleaned) > 200]


def stdlib_root() -> Path:
    """Where the running interpreter keeps the source of the standard library."""
    return Path(sysconfig.get_path("stdlib"))


def stdlib_files(root: Path) -> Iterator[Path]:
    """Its Python files, without tests, third-party packages, tools' own grammars and character tables."""
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        skipped = any(part in STDLIB_SKIPPED or part.startswith("config-") for part in relative.parts)
        if (
            not skipped
            and relative.as_posix() not in STDLIB_SKIPPED_FILES
            and not relative.name.startswith("_sysconfigdata")
        ):
            yield path


def read_stdlib(root: Path | None = None) -> list[str]:
    """Modules of the standard library as documents, data-heavy ones left out."""
    documents = []
    for path in stdlib_files(root or stdlib_root()):
        text = clean(path.read_text(encoding="utf-8", errors="replace"))
        letters = sum(character.isalpha() or character.isspace() for character in text)
        if len(text) > 200 and letters > 0.7 * len(text):
            documents.append(text)
    return documents


def split_held_out(documents: list[str], share: float = HELD_OUT_SHARE) -> tuple[list[str], list[str]]:
    """(train, held out): the documents with the smallest content hashes are held out, at least one of them."""
    ranked = sorted(range(len(documents)), key=lambda index: hashlib.sha1(documents[index].encode()).digest())
    held = set(ranked[: max(1, round(share * len(documents)))])
    return [d for i, d in enumerate(documents) if i not in held], [d for i, d in enumerate(documents) if i in held]


def load_texts(data: Path) -> dict[str, list[str]]:
    """Every permitted text by source name, the standard library included."""
    texts = {source.name: read_source(data, source) for source in TEXTS}
    texts[STDLIB] = read_stdlib()
    return texts


def load_pairs(data: Path) -> dict[str, list[dict[str, object]]]:
    """Every permitted set of instruction records by source name."""
    return {source.name: [json.loads(line) for line in read_source(data, source)] for source in PAIRS}


def attributions(data: Path) -> list[tuple[str, str, str]]:
    """(name, origin, licence) of every source used: exactly what the model card must list."""
    table = read_table(data)
    used = [(source.name, require(table, source.file)) for source in (*TEXTS, *PAIRS)]
    python = f"CPython {sys.version_info.major}.{sys.version_info.minor} standard library, Lib/"
    return [
        *((name, row.origin, row.licence) for name, row in used),
        (STDLIB, python, "PSF License Agreement (PSF-2.0)"),
    ]
