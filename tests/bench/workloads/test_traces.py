"""Trace files: every known kind, their errors, and the recorded ones where they are at hand."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path

import pytest
from tests.data import trace

from headrace.bench.workloads.arrivals import BLOCK, prompt_of
from headrace.bench.workloads.traces import load_trace, slo_of_ratio
from headrace.core.errors import InvalidRequest
from headrace.core.request import SLO

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9305900,0,109\n"
)


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_azure(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"trace.csv{suffix}"
    path.write_bytes({"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}[suffix](AZURE.encode()))
    first, second = load_trace(path, slo=SLO(tpot_ms=5))
    assert (first.time_s, first.prompt_tokens, first.output_tokens) == (0.0, 374, 44)
    assert second.time_s == pytest.approx(4.25)
    assert second.prompt_tokens == 1, "nothing can be sent without a token"
    assert first.slo == SLO(tpot_ms=5)


def test_lengths_alone_arrive_at_random(tmp_path: Path) -> None:
    path = tmp_path / "lengths.csv"
    path.write_text(
        "num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n3772,54,3826,69.8\n2015,156,2171,12.9\n"
    )
    arrivals = load_trace(path, rate=2.0, seed=3)
    assert {(a.prompt_tokens, a.output_tokens) for a in arrivals} <= {(3772, 54), (2015, 156)}
    assert arrivals == load_trace(path, rate=2.0, seed=3)


def lines(path: Path, *rows: dict[str, object]) -> Path:
    path.write_text("\n".join(json.dumps(r) for r in rows) + "\n")
    return path


def test_json_lines(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "own.jsonl",
        {"emission_time_ms": 2000, "prompt": "x" * 400, "output_length": 3, "slo": {"ttft_ms": 7, "tpot_ms": 8}},
        {
            "emission_time_ms": 500,
            "input_length": 9,
            "output_length": 4,
            "slo_ratio": -50,
            "owner": "me",
            "priority": 2,
        },
        {"emission_time_ms": 700, "input_length": 9, "output_length": 4, "category": "chat"},
    )
    second, third, first = load_trace(path, slo=SLO(ttft_ms=1000))
    assert (first.prompt_tokens, first.text, first.slo) == (100, "x" * 400, SLO(7, 8))
    assert (second.time_s, second.slo, second.owner, second.priority) == (0.5, SLO(tpot_ms=50), "me", 2)
    assert (third.category, third.slo) == ("chat", SLO(ttft_ms=1000))


def test_mooncake(tmp_path: Path) -> None:
    path = lines(tmp_path / "m.jsonl", {"timestamp": 27, "input_length": 700, "output_length": 5, "hash_ids": [3, 4]})
    (arrival,) = load_trace(path)
    assert (arrival.time_s, arrival.prompt_tokens, arrival.blocks) == (0.027, 700, (3, 4))


@pytest.mark.parametrize(
    ("ratio", "expected"), [(1.2, SLO(tpot_ms=36.0)), (-150.0, SLO(tpot_ms=150.0)), (1000.0, SLO())]
)
def test_slo_ratios(ratio: float, expected: SLO) -> None:
    assert slo_of_ratio(ratio, 30.0) == expected


def test_impossible_slo_ratios() -> None:
    with pytest.raises(InvalidRequest, match="slo_ratio is 0"):
        slo_of_ratio(0.0, 30.0)
    with pytest.raises(InvalidRequest, match="baseline"):
        slo_of_ratio(1.2, None)
    assert slo_of_ratio(-5.0, None) == SLO(tpot_ms=5.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no request|neither JSON"),
        ("a,b\n1,2\n", "neither JSON nor a known header"),
        (AZURE.replace("374", "many"), "line 2: ContextTokens is 'many': give a number"),
        (AZURE.replace("2023-11-16 18:15:50", "yesterday"), "line 3: TIMESTAMP"),
        ('{"emission_time_ms": 1, "input_length": 3}\n', "line 1: output_length is missing: give a number"),
        ('{"emission_time_ms": 1, "input_length": 3, "output_length": 2}\n{"emission\n', "line 2"),
        ('{"emission_time_ms": 1, "input_length": 3, "output_length": 2, "slo_ratio": 1.5}\n', "baseline"),
        ('{"emission_time_ms": 1, "output_length": 2}\n', "line 1: input_length is missing: give a number"),
        (
            '{"emission_time_ms": 1, "input_length": 1, "output_length": 2, "slo": {"tpot_ms": -1}}\n',
            "line 1: slo.tpot_ms",
        ),
        (
            '{"emission_time_ms": "soon", "input_length": 3, "output_length": 2}\n',
            "line 1: emission_time_ms is 'soon': give",
        ),
        ('{"input_length": 3, "output_length": 2}\n', "line 1: emission_time_ms is missing"),
        ('{"emission_time_ms": 1, "input_length": -3, "output_length": 2}\n', "line 1: input_length is -3"),
        ('{"emission_time_ms": 1, "prompt": [1], "output_length": 2}\n', "line 1: prompt is .*give a text"),
        ('{"timestamp": 1, "input_length": 1, "output_length": 2, "hash_ids": ["a"]}\n', "line 1: hash_ids"),
        (
            '{"emission_time_ms": 1, "input_length": 1, "output_length": 2, "slo": 5}\n',
            "line 1: slo is 5: give an object",
        ),
        (
            '{"emission_time_ms": 1, "input_length": 1, "output_length": 2, "slo": {"ttft_ms": "x"}}\n',
            "line 1: ttft_ms",
        ),
        ('{"emission_time_ms": 1, "input_length": 1, "output_length": 2}\n[1]\n', "line 2: .* is no JSON object"),
    ],
)
def test_damaged_traces_are_explained(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "trace"
    path.write_text(text)
    with pytest.raises(InvalidRequest, match=message) as caught:
        load_trace(path)
    assert str(path) in caught.value.message


def test_unreadable_files_are_explained(tmp_path: Path) -> None:
    (tmp_path / "a.gz").write_text("no gzip")
    (tmp_path / "a.xz").write_bytes(lzma.compress(b"x" * 1000)[:40])
    for name in ("a.gz", "a.xz", "missing"):
        with pytest.raises(InvalidRequest, match="cannot be read"):
            load_trace(tmp_path / name)


def test_the_azure_conversation_trace() -> None:
    arrivals = load_trace(trace("azure_llm_2023_conv.csv.gz"))
    assert len(arrivals) == 19366
    assert arrivals[-1].time_s == pytest.approx(3501.72, abs=0.1)


def test_the_adaserve_trace() -> None:
    arrivals = load_trace(trace("adaserve_rps4.0.jsonl.xz"), baseline_tpot_ms=30.0)
    assert len(arrivals) == 1400
    assert {a.slo.tpot_ms for a in arrivals} == {1.2 * 30.0, 50.0, 150.0}
    assert {a.output_tokens for a in arrivals} == {256}


def test_the_mooncake_trace_repeats_more_than_a_third_of_its_blocks() -> None:
    arrivals = load_trace(trace("mooncake_conversation.jsonl.xz"))
    blocks = [block for a in arrivals for block in a.blocks or ()]
    assert 1 - len(set(blocks)) / len(blocks) == pytest.approx(0.366, abs=0.002)
    first, second = (prompt_of(a, i, vocab_size=32_000) for i, a in enumerate(arrivals[:2]))
    assert first[:BLOCK] == second[:BLOCK]
    assert first[BLOCK : 2 * BLOCK] != second[BLOCK : 2 * BLOCK]
