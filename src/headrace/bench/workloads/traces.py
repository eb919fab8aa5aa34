"""Recorded workloads from files, told apart by their columns; .gz and .xz are opened as they are.

- CSV ``TIMESTAMP, ContextTokens, GeneratedTokens``: Azure LLM inference traces.
- CSV ``num_prefill_tokens, num_decode_tokens``: lengths alone (as of arXiv summarisation); arrivals are then drawn.
- JSON lines with ``timestamp``, lengths and ``hash_ids``: Mooncake, whose equal block ids are shared prefixes.
- JSON lines with ``emission_time_ms``, ``output_length`` and ``prompt`` or ``input_length``: AdaServe's traces and one's own. Optional:
  ``slo_ratio`` (see :func:`slo_of_ratio`), ``slo`` {``ttft_ms``, ``tpot_ms``}, ``category``, ``owner``, ``priority``.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from headrace.bench.workloads.arrivals import Arrival, poisson
from headrace.core.errors import HeadraceError, InvalidRequest
from headrace.core.request import SLO

NO_SLO_ABOVE = 999.0
CHARACTERS_PER_TOKEN = 4


def load_trace(
    path: Path, *, baseline_tpot_ms: float | None = None, rate: float = 1.0, seed: int = 0, slo: SLO | None = None
) -> list[Arrival]:
    """Read a trace, ordered by time.

    Args:
        path: the file.
        baseline_tpot_ms: TPOT of a lone request, for SLOs stated as its multiples.
        rate: requests a second where the file has lengths only.
        seed: of what is drawn.
        slo: targets of requests that bring none.

    Raises:
        InvalidRequest: the file cannot be read or is none of the known kinds; the message names the line.
    """
    try:
        with _opened(path) as handle:
            first = handle.readline()
            lines = _chain(first, handle)
            if first.lstrip("\ufeff").lstrip().startswith("{"):
                made = [
                    _from_json(line, number, baseline_tpot_ms) for number, line in enumerate(lines, 1) if line.strip()
                ]
            else:
                made = _from_csv(csv.DictReader(lines), rate, seed)
    except HeadraceError as error:
        raise InvalidRequest(f"{path}: {error.message}", field="trace") from error
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path} cannot be read: {error}", field="trace") from error
    if not made:
        raise InvalidRequest(f"{path} holds no request", field="trace")
    if slo is not None:
        made = [a if a.slo != SLO() else _with_slo(a, slo) for a in made]
    return sorted(made, key=lambda arrival: arrival.time_s)


def slo_of_ratio(ratio: float, baseline_tpot_ms: float | None) -> SLO:
    """The target behind AdaServe's ``slo_ratio``: above 0 a multiple of the baseline TPOT, below 0 milliseconds, above 999 none.

    Raises:
        InvalidRequest: a multiple without a baseline, or 0.
    """
    if ratio > NO_SLO_ABOVE:
        return SLO()
    if ratio < 0:
        return SLO(tpot_ms=-ratio)
    if ratio == 0:
        raise InvalidRequest("slo_ratio is 0: give a multiple above 0, or milliseconds below 0", field="slo_ratio")
    if baseline_tpot_ms is None:
        raise InvalidRequest(
            "slo_ratio is a multiple of the baseline TPOT, which is not known: give it", field="slo_ratio"
        )
    return SLO(tpot_ms=ratio * baseline_tpot_ms)


def _opened(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return io.TextIOWrapper(gzip.open(path), encoding="utf-8")
    if path.suffix == ".xz":
        return io.TextIOWrapper(lzma.open(path), encoding="utf-8")
    return path.open(encoding="utf-8")


def _chain(first: str, rest: Iterable[str]) -> Iterator[str]:
    yield first.lstrip("\ufeff")
    yield from rest


def _from_csv(reader: csv.DictReader[str], rate: float, seed: int) -> list[Arrival]:
    columns = set(reader.fieldnames or ())
    if {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} <= columns:
        return _azure(reader)
    if {"num_prefill_tokens", "num_decode_tokens"} <= columns:
        lengths = [
            (_length(row, "num_prefill_tokens", n), _length(row, "num_decode_tokens", n))
            for n, row in enumerate(reader, 2)
        ]
        return poisson(rate, len(lengths), seed=seed, lengths=lengths) if lengths else []
    raise InvalidRequest(
        "its first line is neither JSON nor a known header: give JSON lines with emission_time_ms, prompt or input_length, "
        "and output_length",
        field="trace",
    )


def _azure(reader: csv.DictReader[str]) -> list[Arrival]:
    made: list[Arrival] = []
    start: datetime | None = None
    for number, row in enumerate(reader, 2):
        try:
            stamp = datetime.fromisoformat(row["TIMESTAMP"][:26])  # seven decimals in the file, six in a datetime
        except (ValueError, TypeError) as error:
            raise InvalidRequest(f"line {number}: TIMESTAMP {row['TIMESTAMP']!r} is no date and time") from error
        start = start or stamp
        prompt, output = _length(row, "ContextTokens", number), _length(row, "GeneratedTokens", number)
        made.append(Arrival((stamp - start).total_seconds(), prompt, output))
    return made


def _from_json(line: str, number: int, baseline: float | None) -> Arrival:
    try:
        data: Any = json.loads(line)
    except ValueError as error:
        raise InvalidRequest(f"line {number}: no JSON ({error})") from error
    if not isinstance(data, dict):
        raise InvalidRequest(f"line {number}: {line.strip()[:40]!r} is no JSON object")
    field = _Fields(data, number)
    text, blocks = data.get("prompt"), data.get("hash_ids")
    if text is not None and not isinstance(text, str):
        raise field.wrong("prompt", "a text")
    if blocks is not None and not (isinstance(blocks, list) and all(isinstance(b, int) for b in blocks)):
        raise field.wrong("hash_ids", "a list of whole numbers")
    time = "timestamp" if "timestamp" in data and "emission_time_ms" not in data else "emission_time_ms"
    from_text = text is not None and "input_length" not in data
    return Arrival(
        time_s=field.number(time) / 1e3,
        prompt_tokens=max(1, len(text or "") // CHARACTERS_PER_TOKEN) if from_text else field.length("input_length"),
        output_tokens=field.length("output_length"),
        text=text,
        blocks=None if blocks is None else tuple(blocks),
        slo=field.slo(baseline),
        category=str(data.get("category", data.get("slo_ratio", ""))),
        owner=str(data.get("owner", "")),
        priority=int(field.number("priority", 0)),
    )


class _Fields:
    """One line's fields; what is wrong with them is said with the line, the field and the value."""

    def __init__(self, data: dict[str, Any], line: int) -> None:
        self._data, self._line = data, line

    def wrong(self, name: str, wanted: str) -> InvalidRequest:
        """The error of a field that is missing or not ``wanted``."""
        if name not in self._data:
            return InvalidRequest(f"line {self._line}: {name} is missing: give {wanted}", field=name)
        return InvalidRequest(f"line {self._line}: {name} is {self._data[name]!r:.60}: give {wanted}", field=name)

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number."""
        value = self._data.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.wrong(name, "a number")
        return float(value)

    def length(self, name: str) -> int:
        """A number of tokens; 0 counts as 1, for nothing can be sent or answered without a token."""
        value = self.number(name)
        if value < 0:
            raise self.wrong(name, "a number of tokens")
        return max(1, int(value))

    def slo(self, baseline: float | None) -> SLO:
        """Targets from ``slo_ratio`` or ``slo``."""
        try:
            if "slo_ratio" in self._data:
                return slo_of_ratio(self.number("slo_ratio"), baseline)
            targets = self._data.get("slo") or {}
            if not isinstance(targets, dict):
                raise self.wrong("slo", "an object with ttft_ms and tpot_ms")
            inner = _Fields(targets, self._line)
            found = {name: inner.number(name) for name in ("ttft_ms", "tpot_ms") if targets.get(name) is not None}
            return SLO(**found)
        except InvalidRequest as error:
            if error.message.startswith("line "):
                raise
            raise InvalidRequest(f"line {self._line}: {error.message}", field=error.field) from error


def _length(row: dict[str, Any], name: str, number: int) -> int:
    try:
        length = int(row[name])
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"line {number}: {name} is {row[name]!r:.60}: give a number of tokens") from error
    return max(length, 1)


def _with_slo(arrival: Arrival, slo: SLO) -> Arrival:
    return replace(arrival, slo=slo)
