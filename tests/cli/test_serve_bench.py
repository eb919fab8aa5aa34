"""``headrace bench serve`` and ``soak`` on the real server and the bundled model, as short as they can be."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytest.importorskip("matplotlib")

QUIET = {**os.environ, "HEADRACE_PROFILE": "off"}


def bench(*arguments: str, wait: bool = True) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "headrace", "bench", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=QUIET)
    if wait:
        process.wait(280)
    return process


def test_a_short_sweep_of_the_real_server(tmp_path: Path) -> None:
    path = tmp_path / "serve.json"
    trace = tmp_path / "mine.jsonl"
    trace.write_text(
        "".join(f'{{"emission_time_ms": {100 * i}, "input_length": 20, "output_length": 4}}\n' for i in range(30))
    )
    done = bench(
        "serve",
        "--quick",
        "--skip",
        "closed",
        "--skip",
        "simulation",
        "--threads",
        "1",
        "--json",
        str(path),
        "--trace",
        str(trace),
    )
    stdout, stderr = done.communicate()
    assert done.returncode == 0, stderr
    claims = json.loads(stdout.splitlines()[-1])
    data = json.loads(path.read_text())
    assert data["claims"] == claims
    assert data["partial"] is False
    kinds = {r["kind"] for r in data["rows"]}
    assert kinds == {"lone", "saturation", "request", "run"}
    requests = [r for r in data["rows"] if r["kind"] == "request"]
    assert {r["load"] for r in requests} == {"poisson", "mine"}
    finished = [r for r in requests if r["finished"]]
    assert finished, "the server answered"
    assert all(r["decoded"] == r["output_tokens"] for r in finished), "every answer has the length that was asked for"
    assert claims["saturation_requests_per_s"] > 0
    assert path.with_suffix(".png").stat().st_size > 10_000
    assert "headrace" in stdout
    assert "attained" in stdout
    check = bench("check", str(path))
    assert check.returncode == 0, check.communicate()[1]


def test_the_closed_loop_is_shown_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    from headrace.bench.results import new_result
    from headrace.cli.serve_bench import _print_closed

    turn = {"kind": "decode", "engine": "headrace", "precision": "fp32", "batch": 8, "decode_tok_s": 321.5, "prefill_tok_s": 900.0,
            "probe_before_gb_s": 20.0, "probe_after_gb_s": 20.0}  # fmt: skip
    lost = {"kind": "lost", "engine": "vllm", "precision": "fp32", "why": "vllm gave no answer to 'load' within 300 s"}
    _print_closed(new_result("serve", [turn, {**turn, "decode_tok_s": 400.5}, lost], lambda rows: {}, (0.0,)))
    shown = capsys.readouterr()
    assert re.search(r"headrace +fp32 +8 +361\.0 +321\.5 to 400\.5 +900 +2", shown.out)
    assert "vllm fp32: vllm gave no answer" in shown.err


def test_an_interrupted_soak_keeps_its_rows_and_leaves_no_server(tmp_path: Path) -> None:
    path = tmp_path / "soak.json"
    soak = bench("soak", "--minutes", "9", "--threads", "1", "--json", str(path), wait=False)
    assert soak.stderr is not None
    for line in soak.stderr:
        if "minute 0.0" in line:
            break
    children = psutil.Process(soak.pid).children(recursive=True)
    assert any("serve" in child.cmdline() for child in children)
    time.sleep(5)
    soak.send_signal(signal.SIGTERM)
    stdout, stderr = soak.communicate(timeout=60)
    assert soak.returncode == 130, stderr
    data = json.loads(path.read_text())
    assert data["partial"] is True
    assert {"lone", "saturation", "sample"} <= {r["kind"] for r in data["rows"]}
    sample = next(r for r in data["rows"] if r["kind"] == "sample")
    assert sample["engine_rss_mib"] > 100
    assert sample["server_fds"] > 5
    assert sample["slots"] > 0
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    assert json.loads(stdout.splitlines()[-1]) == data["claims"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "--skip", "everything"], "skip is everything: choose of closed, sweep"),
        (["serve", "--quick", "--skip", "closed", "--skip", "simulation", "--model", "/nowhere"], "nowhere"),
        (["soak", "--minutes", "0"], "minutes is 0.0"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = bench(*arguments, "--json", str(tmp_path / "x.json"))
    _, stderr = done.communicate()
    assert done.returncode == 2, stderr
    assert message in stderr.strip().splitlines()[-1]
    assert "Traceback" not in stderr
