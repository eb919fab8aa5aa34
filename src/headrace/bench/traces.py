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
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from headrace.bench.workload import Arrival, poisson
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
            (_length(row["num_prefill_tokens"], n), _length(row["num_decode_tokens"], n))
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
        prompt, output = _length(row["ContextTokens"], number), _length(row["GeneratedTokens"], number)
        made.append(Arrival((stamp - start).total_seconds(), prompt, output))
    return made


def _from_json(line: str, number: int, baseline: float | None) -> Arrival:
    try:
        data: Any = json.loads(line)
        time_ms = float(data["emission_time_ms"] if "emission_time_ms" in data else data["timestamp"])
        text, blocks = data.get("prompt"), data.get("hash_ids")
        length = data.get("input_length", None if text is None else max(1, len(text) // CHARACTERS_PER_TOKEN))
        return Arrival(
            time_s=time_ms / 1e3,
            prompt_tokens=_length(length, number),
            output_tokens=_length(data["output_length"], number),
            text=text,
            blocks=None if blocks is None else tuple(int(b) for b in blocks),
            slo=_slo(data, baseline),
            category=str(data.get("category", data.get("slo_ratio", ""))),
            owner=str(data.get("owner", "")),
            priority=int(data.get("priority", 0)),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidRequest(f"line {number}: {error!r} is missing or of the wrong kind") from error


def _slo(data: Any, baseline: float | None) -> SLO:
    if "slo_ratio" in data:
        return slo_of_ratio(float(data["slo_ratio"]), baseline)
    targets = data.get("slo") or {}
    return SLO(ttft_ms=targets.get("ttft_ms"), tpot_ms=targets.get("tpot_ms"))


def _length(value: Any, number: int) -> int:
    try:
        length = int(value)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"line {number}: {value!r} is no number of tokens") from error
    return max(length, 1)


def _with_slo(arrival: Arrival, slo: SLO) -> Arrival:
    from dataclasses import replace

    return replace(arrival, slo=slo)
