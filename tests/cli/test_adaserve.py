"""``headrace bench adaserve`` from the outside: a trace of one's own, bad input, and what a later run keeps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

ENVIRONMENT = {**os.environ, "HEADRACE_PROFILE": "off", "OMP_NUM_THREADS": "1"}


def bench(*arguments: str, cache: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "headrace", "bench", "adaserve", *arguments]
    environment = {**ENVIRONMENT, "HEADRACE_CACHE": str(cache)}
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, env=environment)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """A burst of one's own: other prompts, other classes, no class with a ratio."""
    path = tmp_path / "mine.jsonl"
    lines = [
        {
            "emission_time_ms": 40 * i,
            "prompt": f"The {i}th mill stands where the river falls. " * 4,
            "output_length": 40,
        }
        | ({"slo": {"tpot_ms": 45}} if i % 2 else {"slo_ratio": 1.5})
        for i in range(60)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_trace_of_ones_own_is_replayed_and_kept(trace: Path, tmp_path: Path) -> None:
    path = tmp_path / "out" / "mine.json"
    done = bench(
        "--trace", str(trace), "--part", "simulated", "--quick", "--workers", "1", "--json", str(path), cache=tmp_path
    )
    assert done.returncode == 0, done.stderr
    claims, data = json.loads(done.stdout.splitlines()[-1]), json.loads(path.read_text())
    assert data["claims"] == claims
    assert data["partial"] is False
    assert claims["sim_never_below_margin_points"] >= -3.4  # two requests of sixty
    assert {row["policy"] for row in data["rows"]} == {"chunked", "spec-4", "adaptive-chain", "adaserve"}
    assert (path.parent / "mine_simulated.png").read_bytes().startswith(b"\x89PNG")
    # Another part later keeps the rows of this one, and a file of something else is not overwritten.
    later = ("--part", "simulated", "--policy", "chunked", "--rate", "5", "--json", str(path))
    again = bench("--trace", str(trace), *later, cache=tmp_path)
    assert again.returncode == 0, again.stderr
    assert {row["policy"] for row in json.loads(path.read_text())["rows"]} == {"chunked"}
    path.write_text('{"name": "serve", "rows": []}')
    refused = bench("--trace", str(trace), "--part", "real", "--json", str(path), cache=tmp_path)
    assert refused.returncode == 2
    assert len(refused.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "gpt"], "model is 'gpt'"),
        (["--part", "imagined"], "no part 'imagined'"),
        (["--precision", "int3"], "precision is 'int3'"),
        (["--policy", "magic"], "policy is 'magic'"),
        (["--rate", "-1"], "rate is"),
        (["--load", "0"], "load is"),
        (["--shape", "7z"], "shape is '7z'"),
        ([], "input_length"),
    ],
)
def test_wrong_input_costs_a_line_and_nothing_else(arguments: list[str], said: str, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"emission_time_ms": 3}\n')
    path = tmp_path / "x.json"
    done = bench("--trace", str(bad), "--json", str(path), *arguments, cache=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not path.exists()
