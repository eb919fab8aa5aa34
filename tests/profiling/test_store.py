"""Profiles on disk: found again, measured again when damaged, never half written."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from headrace.core.batch import StepShape
from headrace.profiling import MeasuredProfile, Point
from headrace.profiling.store import ProfileKey, load_or_measure, path_of, read, save

KEY = ProfileKey("abc", "a processor, 2 threads", "float32", "numba", "native", versions={"torch": "2.13"})
SHAPES = [StepShape(0, n, 10 * n, n, 11 * n) for n in (1, 4, 16)] + [StepShape(64, 4, 40, 5, 4140)]


def fresh() -> MeasuredProfile:
    return MeasuredProfile([Point(s, (2.0 + s.decode_tokens, 0.1 + 1 / 3, 50.0)) for s in SHAPES])


class Counter:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> MeasuredProfile:
        self.calls += 1
        return fresh()


def test_round_trip_is_exact(tmp_path: Path) -> None:
    path = path_of(KEY, tmp_path)
    save(fresh(), KEY, path)
    again = read(path, KEY)
    assert again.points == fresh().points
    assert [again.cost(s) for s in SHAPES] == [fresh().cost(s) for s in SHAPES]
    data = json.loads(path.read_text())
    assert data["key"]["device"] == KEY.device
    assert data["points"][0] == {
        "prefill_tokens": 0, "decode_tokens": 1, "context": 10, "sequences": 1, "attended": 11,
        "p50_ms": 3.0, "ms": [3.0, 0.1 + 1 / 3, 50.0],
    }  # fmt: skip


def test_measured_once(tmp_path: Path) -> None:
    count = Counter()
    for _ in range(3):
        load_or_measure(KEY, count, folder=tmp_path)
    assert count.calls == 1
    load_or_measure(KEY, count, folder=tmp_path, again=True)
    assert count.calls == 2
    assert [p.name for p in tmp_path.iterdir()] == [f"{KEY.digest}.json"], "nothing left over"


def test_what_was_learnt_is_kept(tmp_path: Path) -> None:
    learnt = fresh()
    for _ in range(20):
        learnt.observe(SHAPES[1], 9.0)
    save(learnt, KEY, path_of(KEY, tmp_path))
    again = read(path_of(KEY, tmp_path), KEY)
    assert again.cost(SHAPES[1]) == pytest.approx(learnt.cost(SHAPES[1]))
    assert again.base == fresh().base


@pytest.mark.parametrize(
    "change",
    [
        {"model": "x"},
        {"device": "x"},
        {"dtype": "x"},
        {"attention": "x"},
        {"linears": "x"},
        {"kv_dtype": "int8"},
        {"quantize": "int8"},
        {"tp": 2},
        {"versions": {}},
    ],
)
def test_every_part_of_the_key_matters(change: dict[str, object], tmp_path: Path) -> None:
    count = Counter()
    load_or_measure(KEY, count, folder=tmp_path)
    load_or_measure(replace(KEY, **change), count, folder=tmp_path)  # type: ignore[arg-type]
    assert count.calls == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace('"format": 2', '"format": 99'),
        lambda text: text.replace('"correction": {}', '"correction": {"decode:0": Infinity}'),
        lambda text: text.replace('"correction": {}', '"correction": {"sideways:0": 1.0}'),
        lambda text: text.replace('"context": 10', '"context": Infinity'),
        lambda text: "[" * 100_000,
        lambda text: text + " " * (5 << 20),
        lambda text: text.replace('"ms"', '"msec"'),
        lambda text: text.replace('"ms": [', '"ms": [-9, -9, -9, -9, '),
        lambda text: text.replace("a processor", "another"),
    ],
)
def test_a_damaged_file_is_measured_again_with_a_warning(
    damage: object, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert callable(damage)
    count = Counter()
    load_or_measure(KEY, count, folder=tmp_path)
    path = path_of(KEY, tmp_path)
    path.write_text(damage(path.read_text()))
    with caplog.at_level(logging.WARNING):
        found = load_or_measure(KEY, count, folder=tmp_path)
    assert count.calls == 2
    assert "measuring again" in caplog.text
    assert read(path, KEY).points == found.points == fresh().points


def test_without_a_usable_cache_it_still_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path / "file"))
    count = Counter()
    with caplog.at_level(logging.WARNING):
        assert load_or_measure(KEY, count).points == fresh().points
    assert "will not be kept" in caplog.text


def test_the_default_place_is_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path))
    assert path_of(KEY) == tmp_path / "profiles" / f"{KEY.digest}.json"
