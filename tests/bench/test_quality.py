"""Likelihood lost to rounding: every form reads the same windows, and claims follow from the rows."""

from __future__ import annotations

import lzma
import math
from pathlib import Path

import pytest
import torch
from tests import tiny

from headrace.bench import quality
from headrace.core.errors import InvalidRequest, ModelNotFound


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_every_form_reads_the_same_windows(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "held-out.txt.xz"
    text.write_bytes(
        lzma.compress(("The mill wheel turns by the water of the headrace, day and night. " * 400).encode())
    )
    setting = quality.QualityBench(str(folder), (text,), windows=3, length=100, threads=1)
    result = quality.run(setting)
    of = {form.name: [row for row in result.rows if row["form"] == form.name] for form in quality.FORMS}
    plain = of["as it is"]
    assert [row["tokens"] for row in plain] == [99, 99, 99]
    assert [row["nll"] for row in plain] == [row["nll_plain"] for row in plain]
    for name in ("int8 K and V", "int8 weights", "int8 both"):
        assert [row["nll_plain"] for row in of[name]] == [row["nll"] for row in plain]
        assert 0 < max(abs(row["nll"] - row["nll_plain"]) for row in of[name]) < 0.2
        assert all(0.5 < row["same_greedy"] <= 1 for row in of[name])
    assert quality.claims(result.rows) == result.claims
    assert set(result.claims) >= {"kv_int8_nll_gap", "int8_nll_gap", "int8_same_greedy"}


def test_without_texts_the_built_in_one_is_read(folder: Path) -> None:
    result = quality.run(quality.QualityBench(str(folder), length=70, threads=1))
    assert {row["text"] for row in result.rows} == {quality.BUILT_IN}
    assert {row["tokens"] for row in result.rows} == {69}


def test_claims_weigh_windows_by_their_tokens() -> None:
    rows = [
        {"form": "int8 K and V", "tokens": 30, "nll": 3.1, "nll_plain": 3.0, "same_greedy": 1.0},
        {"form": "int8 K and V", "tokens": 10, "nll": 3.0, "nll_plain": 3.0, "same_greedy": 0.2},
    ]
    found = quality.claims(rows)
    assert found == {"kv_int8_nll_gap": pytest.approx(0.075), "kv_int8_same_greedy": pytest.approx(0.8)}
    assert quality.spread(rows) == pytest.approx(0.05)
    assert math.isnan(quality.spread(rows[:1]))


def test_what_cannot_be_read_is_named(folder: Path, tmp_path: Path) -> None:
    for bad in (tmp_path / "missing.txt", tmp_path / "broken.txt.xz"):
        if "broken" in bad.name:
            bad.write_bytes(b"no archive")
        with pytest.raises(InvalidRequest, match=bad.name):
            quality.run(quality.QualityBench(str(folder), (bad,), threads=1))
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    with pytest.raises(InvalidRequest, match="no two tokens"):
        quality.run(quality.QualityBench(str(folder), (empty,), threads=1))
    with pytest.raises(ModelNotFound):
        quality.run(quality.QualityBench(str(tmp_path / "nowhere"), threads=1))
