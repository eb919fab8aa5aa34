"""Workloads of a sweep: lengths shrink in proportion, shared blocks stay shared, pieces keep their rate, classes their multiples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headrace.bench.openloop.loads import CLASSES, Load, Lone, Model, drawn_load, recorded_load, with_classes
from headrace.bench.workloads.arrivals import Arrival, excerpt, scaled
from headrace.core.request import SLO

LONE = Lone(ttft_ms=10.0, tpot_ms=2.0)


def test_lengths_shrink_in_proportion_and_fit() -> None:
    arrivals = [Arrival(float(i), 100 * (i + 1), 10 * (i + 1), blocks=(1, i)) for i in range(100)]
    shrunk, by_prompt, by_output = scaled(arrivals, 512)
    assert (by_prompt, by_output) == (pytest.approx(384 / 9505), pytest.approx(128 / 950.5))
    assert all(a.prompt_tokens + a.output_tokens <= 512 for a in shrunk)
    assert shrunk[49].prompt_tokens == round(5000 * by_prompt)
    assert {a.block_tokens for a in shrunk} == {round(512 * by_prompt)}
    same, *factors = scaled(arrivals[:2], 4096)
    assert (same, factors) == (arrivals[:2], [1.0, 1.0]), "nothing grows"


def test_shrunk_blocks_are_still_shared() -> None:
    arrivals = [Arrival(float(i), 10_000, 10, blocks=(7, 8 + i)) for i in range(4)]
    shrunk, *_ = scaled(arrivals, 512)
    block = shrunk[0].block_tokens
    first, second, *_ = Model(1000, 512).shots(shrunk, seed=1)
    assert first.prompt[:block] == second.prompt[:block]
    assert first.prompt[block : 2 * block] != second.prompt[block : 2 * block]


def test_a_piece_has_its_rate_and_its_seed() -> None:
    load = drawn_load(512, seed=0)
    piece = load.piece(20.0, 50.0, seed=3)
    assert len(piece) == 1000
    assert piece[0].time_s == 0.0
    assert 999 / piece[-1].time_s == pytest.approx(20.0, rel=0.15)
    assert piece == load.piece(20.0, 50.0, seed=3)
    assert piece != load.piece(20.0, 50.0, seed=4)
    assert len(load.piece(20.0, 50.0, seed=3, most=10)) == 10


def test_a_recorded_piece_is_consecutive_and_keeps_its_bursts() -> None:
    arrivals = [Arrival(t, i + 1, 1) for i, t in enumerate([0.0, 0.1, 0.2, 9.0, 9.1, 9.2])]
    piece = Load("r", arrivals).piece(2.0, 3.0, seed=0)
    assert [a.prompt_tokens for a in piece] == [1, 2, 3, 4, 5, 6]
    assert piece[-1].time_s == pytest.approx(2.5)
    assert piece[3].time_s - piece[2].time_s == pytest.approx(8.8 / 9.2 * 2.5)
    numbers = [a.prompt_tokens for a in excerpt(arrivals, 3, seed=1)]
    assert numbers == list(range(numbers[0], numbers[0] + 3))


def test_classes_are_multiples_of_a_lone_request_and_leave_targets_alone() -> None:
    own = SLO(tpot_ms=1.0)
    made = with_classes([Arrival(0.0, 1, 1), Arrival(1.0, 1, 1, slo=own)] * 60, LONE, seed=0)
    assert {a.category for a in made[::2]} == set(CLASSES)
    for a in made[::2]:
        ttft, tpot = CLASSES[a.category]
        assert a.slo == SLO(10.0 * ttft, 2.0 * tpot)
    assert {a.slo for a in made[1::2]} == {own}


def test_a_recorded_load_takes_multiples_from_the_lone_request(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    line = {"emission_time_ms": 0, "input_length": 5000, "output_length": 9, "slo_ratio": 1.5}
    path.write_text(json.dumps(line) + "\n")
    load = recorded_load(path, 512, LONE, seed=0)
    assert (load.name, load.arrivals[0].slo, load.drawn) == ("mine", SLO(tpot_ms=3.0), False)
    assert load.prompt_scale == pytest.approx(384 / 5000)
