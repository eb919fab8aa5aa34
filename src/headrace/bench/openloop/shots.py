"""Replays over HTTP: a workload becomes shots, the client's process fires them, and its lines become request rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from headrace.bench.metrics import RequestRow
from headrace.bench.workloads.arrivals import Arrival, prompt_of

PATIENCE_S = 30.0
"""How much longer than its job the client's process may take, for its start and for bodies to be written."""


@dataclass(frozen=True, slots=True)
class Shot:
    """One request, ready to be sent: ``at_s`` seconds after the start, ``prompt`` as token ids, ``new`` tokens wanted."""

    id: str
    at_s: float
    prompt: tuple[int, ...]
    new: int
    arrival: Arrival

    def body(self, model: str) -> dict[str, Any]:
        """The request's JSON for ``/completions``: greedy, streamed, exactly ``new`` tokens.

        Fields that only some servers know (``slo``, ``priority``, ``user``) are sent where the workload has them.
        """
        a = self.arrival
        slo = {k: v for k, v in (("ttft_ms", a.slo.ttft_ms), ("tpot_ms", a.slo.tpot_ms)) if v is not None}
        extra: dict[str, Any] = {"slo": slo, "priority": a.priority, "user": a.owner}
        return {
            "model": model,
            "prompt": list(self.prompt),
            "max_tokens": self.new,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **{name: value for name, value in extra.items() if value},
        }


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a replay gave: a row per request, in the order of the shots, and what the client says of itself.

    ``gaps_ms`` are the milliseconds between each request's tokens by its id, where they were asked for.
    """

    rows: list[RequestRow]
    client: dict[str, Any]
    gaps_ms: dict[str, list[float]] = field(default_factory=dict)


OnRow = Callable[[Mapping[str, Any]], None]


def shots_of(
    arrivals: Sequence[Arrival],
    *,
    vocab_size: int,
    seed: int,
    tokenize: Callable[[str], Sequence[int]] | None = None,
) -> list[Shot]:
    """The shots of a workload; texts are cut to ``prompt_tokens``, everything else is drawn by ``seed``."""
    made = []
    for number, a in enumerate(arrivals):
        prompt = prompt_of(a, number, vocab_size=vocab_size, seed=seed, tokenize=tokenize)[: a.prompt_tokens]
        made.append(Shot(str(number), a.time_s, prompt, a.output_tokens, a))
    return made


def over_http(
    url: str,
    model: str,
    shots: Sequence[Shot],
    *,
    cutoff_s: float,
    concurrency: int | None = None,
    gaps: bool = False,
    on_row: OnRow = lambda row: None,
) -> Replayed:
    """Send ``shots`` to the server at ``url`` from a process of its own.

    Args:
        url: OpenAI base URL.
        model: name the server knows its model by.
        cutoff_s: seconds after which open requests are given up, and then count as not finished.
        concurrency: None sends each shot when it is due; a number keeps so many open and ignores times.
        gaps: keep the milliseconds between tokens, too.
        on_row: told of each request as it ends.

    Returns:
        A row for every shot that was sent or should have been: a client that dies costs its rows an ``error``. In closed loop,
        shots that never had their turn have no row.
    """
    wire = [{"id": s.id, "at_s": s.at_s, "body": s.body(model)} for s in shots]
    job = {"url": url, "shots": wire, "cutoff_s": cutoff_s, "concurrency": concurrency, "gaps": gaps}
    lines, code = _run_client(job, cutoff_s + PATIENCE_S, on_row)
    client = next((line for line in lines if "id" not in line), {})
    answers = {line["id"]: line for line in lines if "id" in line}
    lost = None if client else f"the load client ended early (exit code {code})"
    rows = []
    for shot in shots:
        answer = answers.get(shot.id)
        if answer is None and concurrency is not None:
            continue
        rows.append(row_of(shot, answer or _missing(shot, cutoff_s, lost or "cut off")))
    between = {name: answer["gaps_ms"] for name, answer in answers.items() if "gaps_ms" in answer}
    return Replayed(rows, client, between)


def row_of(shot: Shot, answer: Mapping[str, Any]) -> RequestRow:
    """The row of one request from the client's line.

    Times count from when the request left; by how much that was late is ``lag_ms``. TPOT is the time from the first to the last
    token over the tokens after the first.
    """
    sent, first, last = answer["sent_s"], answer["first_s"], answer["last_s"]
    tokens, finished = answer["tokens"], answer["finished"]
    decoding = first is not None and last is not None and tokens > 1
    row: dict[str, Any] = {
        "id": shot.id,
        "category": shot.arrival.category,
        "owner": shot.arrival.owner,
        "arrival_s": _rounded(sent, 5),
        "end_s": _rounded(answer["end_s"] if last is None else last, 5),
        "prompt_tokens": len(shot.prompt),
        "output_tokens": shot.new,
        "decoded": tokens,
        "cached_tokens": answer.get("cached_tokens", 0),
        "preemptions": 0,
        "finished": finished,
        "ttft_ms": None if first is None else _rounded((first - sent) * 1e3),
        "tpot_ms": _rounded((last - first) / (tokens - 1) * 1e3, 4) if decoding else None,
        "e2e_ms": _rounded((last - sent) * 1e3) if finished and last is not None else None,
        "slo_ttft_ms": shot.arrival.slo.ttft_ms,
        "slo_tpot_ms": shot.arrival.slo.tpot_ms,
        "lag_ms": _rounded((sent - answer["at_s"]) * 1e3),
        "engine_ttft_ms": answer.get("engine_ttft_ms"),
        "error": answer["error"],
    }
    return row  # type: ignore[return-value]


def _missing(shot: Shot, cutoff_s: float, error: str) -> dict[str, Any]:
    at = min(shot.at_s, cutoff_s)
    return {"at_s": shot.at_s, "sent_s": at, "first_s": None, "last_s": None, "end_s": cutoff_s, "tokens": 0,
            "finished": False, "error": error}  # fmt: skip


def _run_client(job: dict[str, Any], limit_s: float, on_row: OnRow) -> tuple[list[dict[str, Any]], int]:
    process = subprocess.Popen(
        [sys.executable, "-m", "headrace.bench.openloop.client"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is ours to handle
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    timer = threading.Timer(limit_s, process.kill)
    timer.start()
    lines: list[dict[str, Any]] = []
    try:
        try:
            json.dump(job, process.stdin)
            process.stdin.close()
        except BrokenPipeError:
            pass  # it died: its exit code says so below
        for text in process.stdout:
            try:
                line = json.loads(text)
            except ValueError:
                break  # cut in the middle by its death
            lines.append(line)
            if "id" in line:
                on_row(line)
        return lines, process.wait()
    finally:
        timer.cancel()
        process.kill()
        process.wait()
        process.stdout.close()


def _rounded(value: float, digits: int = 3) -> float:
    return round(value, digits)
