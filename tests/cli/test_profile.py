"""``headrace profile`` on a tiny checkpoint: measured, kept, used again, drawn."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from tests import tiny
from typer.testing import CliRunner

from headrace.cli import app
from headrace.core.errors import InvalidRequest
from headrace.profiling import store

FAST = ["--linears", "module", "--threads", "1", "--max-sequences", "2", "--max-step-tokens", "16", "--repeats", "1",
        "--max-context", "64", "--kv-gib", "0.01", "--attention", "reference"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "profiles"


def test_measure_keep_and_read_again(folder: Path, cache: Path, tmp_path: Path) -> None:
    plot = tmp_path / "p.png"
    done = CliRunner().invoke(app, ["profile", str(folder), *FAST, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["profile_error_p50"] >= 0
    assert {p["decode_tokens"] for p in found["points"]} >= {0, 1, 2}
    assert all(p["measured_ms"] > 0 and p["predicted_ms"] > 0 for p in found["points"] + found["held_out"])
    (kept,) = cache.iterdir()
    before = kept.read_bytes()
    assert [p.p50 for p in store.read(kept).points] == [p["measured_ms"] for p in found["points"]]

    pytest.importorskip("matplotlib")
    again = CliRunner().invoke(app, ["profile", str(folder), *FAST, "--plot", str(plot)])
    assert again.exit_code == 0, again.output
    assert kept.read_bytes() == before, "the stored profile was used"
    assert "unseen steps: p50" in again.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")

    forced = CliRunner().invoke(app, ["profile", str(folder), *FAST, "--json", "--again"])
    assert forced.exit_code == 0
    assert kept.read_bytes() != before


def test_a_damaged_profile_is_measured_again(folder: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    CliRunner().invoke(app, ["profile", str(folder), *FAST, "--json"])
    (kept,) = cache.iterdir()
    kept.write_text("{")
    with caplog.at_level(logging.WARNING):
        done = CliRunner().invoke(app, ["profile", str(folder), *FAST, "--json"])
    assert done.exit_code == 0
    assert "measuring again" in caplog.text
    assert store.read(kept).points


def test_it_feeds_the_simulator(folder: Path, cache: Path, tmp_path: Path) -> None:
    CliRunner().invoke(app, ["profile", str(folder), *FAST, "--json"])
    (kept,) = cache.iterdir()
    out = tmp_path / "sim.json"
    done = CliRunner().invoke(
        app, ["bench", "simulate", "--profile", str(kept), "--requests", "5", "--rate", "1", "--json", str(out)]
    )
    assert done.exit_code == 0, done.output
    assert json.loads(out.read_text())["claims"]["throughput_tok_s_chunked_at_1"] > 0


def test_a_profile_that_is_none_is_explained(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[]")
    done = CliRunner().invoke(app, ["bench", "simulate", "--profile", str(tmp_path / "x.json")])
    assert isinstance(done.exception, InvalidRequest)
    assert "headrace profile" in done.exception.message
