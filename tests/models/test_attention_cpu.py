"""The CPU backend against brute force, and what it promises about rows, threads and memory."""

from __future__ import annotations

import ctypes
import multiprocessing
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from tests.models.attention_cases import Case, brute_force, build, cases, worst

from headrace.models.attention import cpu, team, tiles, worker
from headrace.models.attention.cpu import NumbaAttention
from headrace.models.attention.dense import is_dense

NUMBA = NumbaAttention()


@settings(max_examples=150, deadline=None)
@given(cases())
def test_equals_the_definition(case: Case) -> None:
    assert worst(case.run(NUMBA), brute_force(case)) < 2e-5


@settings(max_examples=25, deadline=None)
@given(cases(dims=(16, 80)))
def test_bfloat16_planes(case: Case) -> None:
    """Stored in bfloat16, summed in float32."""
    halved = case.to(dtype=torch.bfloat16)
    mixed = replace(halved, q=case.q)
    assert worst(mixed.run(NUMBA), brute_force(mixed)) < 2e-5
    assert halved.run(NUMBA).dtype == torch.bfloat16
    assert worst(halved.run(NUMBA), brute_force(halved)) < 0.03


@settings(max_examples=100, deadline=None)
@given(cases(longest=600))
def test_int8_planes(case: Case) -> None:
    """The error against float64 over the same codes is that of float32 arithmetic, not of rounding codes again."""
    coded = case.coded()
    assert worst(coded.run(NUMBA), brute_force(coded)) < 2e-5 * coded.scales[1].max().item() * 127  # type: ignore[index]


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("wrong", ["neighbour", "head", "one"])
def test_a_wrong_scale_is_seen(which: int, wrong: str) -> None:
    """Negative control: the scale of another slot or head, or half as much again for a single slot."""
    case = build(np.random.default_rng(20), [("decode", 30, 1), ("tree", 20, 40)]).coded()
    assert case.scales is not None
    right = case.scales[which]
    changed = {"neighbour": right.roll(1, 0), "head": right.roll(1, 1), "one": right.clone()}[wrong]
    if wrong == "one":
        changed[int(case.segments[0].context_slots[7])] *= 1.5
    scales = (changed, case.scales[1]) if which == 0 else (case.scales[0], changed)
    assert worst(replace(case, scales=scales).run(NUMBA), brute_force(case)) > 1e-2


def test_int8_planes_come_with_scales_of_their_shape() -> None:
    case = build(np.random.default_rng(21), [("decode", 20, 1)]).coded()
    assert case.scales is not None
    k_scale, v_scale = case.scales
    for scales in (None, (k_scale[:-1], v_scale), (k_scale, v_scale.double()), (k_scale.t().contiguous().t(), v_scale)):
        with pytest.raises(ValueError, match="scales"):
            replace(case, scales=scales).run(NUMBA)
    plain = build(np.random.default_rng(21), [("decode", 20, 1)])
    with pytest.raises(ValueError, match="with scales"):
        replace(plain, scales=case.scales).run(NUMBA)


def test_other_planes_go_to_the_reference() -> None:
    case = build(np.random.default_rng(2), [("tree", 40, 9), ("chain", 3, 4)], softcap=2.0)
    assert worst(case.to(dtype=torch.float16).run(NUMBA), brute_force(case)) < 0.01
    strided = replace(case, k=torch.cat([case.k, case.k], 2)[..., : case.k.shape[2]])
    assert not strided.k.is_contiguous()
    assert worst(strided.run(NUMBA), brute_force(case)) < 2e-5


@pytest.mark.parametrize("window", [None, 2500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_contexts_are_cut_and_merged(window: int | None, dtype: torch.dtype) -> None:
    shapes = [("decode", 5000, 1), ("tree", 2100, 10), ("chain", 4200, 40), ("decode", 2047, 1), ("decode", 2048, 1)]
    case = build(np.random.default_rng(3), shapes, window=window, sinks=True, dims=(16, 24))
    case = replace(case.to(dtype=dtype), q=case.q)
    assert worst(case.run(NUMBA), brute_force(case)) < 2e-5
    assert worst(case.coded().run(NUMBA), brute_force(case.coded())) < 5e-4


@settings(max_examples=25, deadline=None)
@given(cases(longest=2300))
def test_rows_do_not_depend_on_their_batch(case: Case) -> None:
    """A segment alone or among others: the same bits."""
    for stored in (case, case.coded()):
        together, at = stored.run(NUMBA), 0
        for segment in stored.segments:
            rows = slice(at, at + len(segment.tokens))
            alone = replace(stored, segments=[segment], q=stored.q[rows])
            assert torch.equal(alone.run(NUMBA), together[rows])
            at = rows.stop


@pytest.mark.parametrize("window", [None, 200, 700])
@pytest.mark.parametrize("plain", [True, False])
def test_long_chunks(window: int | None, plain: bool) -> None:
    """Chunks left to torch beside segments that are not; with a soft cap everything stays in the kernel."""
    shapes = [("chain", 600, 130), ("decode", 70, 1), ("tree", 500, 60), ("chain", 0, 128), ("chain", 90, 520)]
    case = build(np.random.default_rng(11), shapes, window=window, softcap=None if plain else 3.0, dims=(16, 24))
    dense = [bool(x) for x in is_dense(case.batch, window)]
    assert dense == [window != 200, False, False, False, True]
    assert worst(case.run(NUMBA), brute_force(case)) < 2e-5
    half = replace(case.to(dtype=torch.bfloat16), q=case.q)
    assert worst(half.run(NUMBA), brute_force(half)) < 2e-5
    coded = case.coded()
    assert worst(coded.run(NUMBA), brute_force(coded)) < 5e-4
    lone = replace(case, segments=case.segments[:1], q=case.q[:130])
    assert torch.equal(lone.run(NUMBA), case.run(NUMBA)[:130])


@pytest.mark.parametrize("coded", [False, True])
def test_threads_do_not_change_a_bit(coded: bool) -> None:
    case = build(np.random.default_rng(4), [("decode", 5000, 1), ("chain", 300, 150), ("tree", 900, 33)], heads=(8, 2))
    case = case.coded() if coded else case
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(case.run(NUMBA))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_team_calls_every_member(threads: int) -> None:
    """The worker really runs once per thread, and on the caller alone where torch has no OpenMP."""
    seen: list[int] = []
    worker = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda argument: seen.append(argument))
    address = ctypes.cast(worker, ctypes.c_void_p).value
    assert address is not None
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        team.run(address, 7, threads=8)
    finally:
        torch.set_num_threads(before)
    assert seen == [7] * threads


def test_without_openmp_the_caller_works_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(team, "_parallel", lambda: None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    case = build(np.random.default_rng(5), [("chain", 300, 150)], heads=(8, 2))
    assert worst(case.run(NUMBA), brute_force(case)) < 2e-5


@pytest.mark.parametrize("change", ["window", "softcap", "sinks", "parents"])
def test_what_the_options_change_is_seen(change: str) -> None:
    """Negative control: leaving out any part of the semantics moves the result far past the tolerance."""
    case = build(np.random.default_rng(6), [("tree", 30, 40), ("chain", 9, 8)], window=6, softcap=2.0, sinks=True)
    expected = brute_force(case)
    if change == "parents":
        wrong = replace(case, segments=[replace(s, parents=None) for s in case.segments])
    else:
        wrong = replace(case, **{change: None})
    assert worst(case.run(NUMBA), expected) < 2e-5
    assert worst(wrong.run(NUMBA), expected) > 1e-2


def test_a_window_sees_at_least_the_row() -> None:
    case = build(np.random.default_rng(7), [("decode", 3, 1)], window=0)
    with pytest.raises(ValueError, match="at least 1 key"):
        case.run(NUMBA)


def test_extreme_scores_stay_finite() -> None:
    """Scores of thousands, and rows all but one of whose weights vanish."""
    case = build(np.random.default_rng(8), [("decode", 200, 1), ("chain", 30, 20)], scale=300.0, sinks=True)
    assert worst(case.run(NUMBA), brute_force(case)) < 1e-3


def test_without_a_cache_folder_it_compiles_anyway(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def compile_worker(storage: str, *, cache: bool) -> str:
        asked.append(cache)
        if cache:
            raise RuntimeError("cannot cache function 'worker': no locator available for file 'kernel.py'")
        return storage

    monkeypatch.setattr("headrace.models.attention.worker.compile_worker", compile_worker)
    assert cpu.compiled.__wrapped__("float32") == "float32"
    assert asked == [True, False]


def _spawned(pipe: Connection) -> None:
    case = build(np.random.default_rng(9), [("tree", 50, 12)])
    pipe.send(case.run(NumbaAttention()).numpy())


def test_works_in_a_spawned_process() -> None:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_spawned, args=(there,))
    process.start()
    assert here.poll(120)
    result = torch.from_numpy(here.recv())
    process.join()
    assert (result - build(np.random.default_rng(9), [("tree", 50, 12)]).run(NUMBA)).abs().max() < 1e-6


def test_compiled_code_is_known_by_all_its_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A kernel kept from before a change in a file it includes is not taken for the present one."""
    before = worker._digest()
    changed = tmp_path / "tiles.py"
    changed.write_text(Path(str(tiles.__file__)).read_text().replace("BLOCK = 64", "BLOCK = 32"))
    monkeypatch.setattr(tiles, "__file__", str(changed))
    assert worker._digest() != before


@pytest.mark.parametrize("wrong", ["rows", "slots", "heads", "dim"])
def test_sizes_that_do_not_fit_are_refused(wrong: str) -> None:
    """The kernel checks no index, so what could lead it outside of its arrays must not reach it."""
    case = build(np.random.default_rng(10), [("decode", 20, 1)])
    changed = {
        "rows": {"q": torch.cat([case.q, case.q])},
        "slots": {"k": case.k[:5], "v": case.v[:5]},
        "heads": {"q": torch.cat([case.q, case.q[:, :1]], 1)},
        "dim": {"q": case.q[..., :8]},
    }[wrong]
    with pytest.raises(ValueError, match=r"rows and the planes|do not fit"):
        replace(case, **changed).run(NUMBA)
    negative = replace(case, segments=[replace(s, write_slots=-s.write_slots - 1) for s in case.segments])
    with pytest.raises(ValueError, match="slots start at 0"):
        negative.run(NUMBA)
