"""The Triton backend: on a CUDA device, or on CPU tensors when ``TRITON_INTERPRET=1`` is set from the start."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from tests.models.attention_cases import Case, brute_force, build, cases, worst

from headrace.models.attention.interface import AttentionBackend, get_backend

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a CUDA device"),
]
EXAMPLES = 12 if INTERPRETED else 150


@pytest.fixture(scope="module")
def triton() -> AttentionBackend:
    return get_backend("triton", DEVICE)


@settings(max_examples=EXAMPLES, deadline=None, derandomize=INTERPRETED)
@given(case=cases(longest=600))
def test_equals_the_definition(triton: AttentionBackend, case: Case) -> None:
    assert worst(case.to(device=DEVICE).run(triton), brute_force(case)) < 2e-5


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 0.04), (torch.float16, 0.005)])
@pytest.mark.parametrize("dims", [(64, 64), (80, 96)])
def test_half_precision(triton: AttentionBackend, dtype: torch.dtype, limit: float, dims: tuple[int, int]) -> None:
    shapes = [("tree", 40, 33), ("decode", 700, 1), ("chain", 9, 40)]
    case = build(np.random.default_rng(0), shapes, dims=dims, softcap=3.0, sinks=True, window=500)
    rounded = case.to(device=DEVICE, dtype=dtype)
    assert rounded.run(triton).dtype == dtype
    assert worst(rounded.run(triton), brute_force(rounded)) < limit


@settings(max_examples=EXAMPLES, deadline=None, derandomize=INTERPRETED)
@given(case=cases(longest=600))
def test_int8_planes(triton: AttentionBackend, case: Case) -> None:
    coded = case.coded()
    assert worst(coded.to(device=DEVICE).run(triton), brute_force(coded)) < 1e-3


@pytest.mark.parametrize("which", [0, 1])
def test_a_wrong_scale_is_seen(triton: AttentionBackend, which: int) -> None:
    """Negative control: every slot with the scale of another."""
    case = build(np.random.default_rng(20), [("decode", 30, 1), ("tree", 20, 40)]).coded()
    assert case.scales is not None
    scales = [case.scales[0], case.scales[1]]
    scales[which] = scales[which].roll(1, 0)
    wrong = replace(case, scales=(scales[0], scales[1]))
    assert worst(wrong.to(device=DEVICE).run(triton), brute_force(case)) > 1e-2


@pytest.mark.parametrize("window", [None, 700])
def test_long_contexts_are_split_and_merged(triton: AttentionBackend, window: int | None) -> None:
    shapes = [("decode", 1700, 1), ("tree", 1030, 10), ("chain", 1030, 40), ("decode", 512, 1), ("decode", 0, 1)]
    case = build(np.random.default_rng(1), shapes, window=window, sinks=True, dims=(16, 24))
    assert worst(case.to(device=DEVICE).run(triton), brute_force(case)) < 2e-5


def test_a_prefill_chunk_longer_than_a_tile(triton: AttentionBackend) -> None:
    case = build(np.random.default_rng(2), [("chain", 100, 150), ("chain", 0, 70)], heads=(8, 2), window=90)
    assert worst(case.to(device=DEVICE).run(triton), brute_force(case)) < 2e-5


def test_more_query_heads_than_a_tile(triton: AttentionBackend) -> None:
    case = build(np.random.default_rng(3), [("decode", 20, 1), ("tree", 3, 5)], heads=(71, 1))
    assert worst(case.to(device=DEVICE).run(triton), brute_force(case)) < 2e-5


@pytest.mark.parametrize("change", ["window", "softcap", "sinks", "parents"])
def test_what_the_options_change_is_seen(triton: AttentionBackend, change: str) -> None:
    """Negative control: leaving out any part of the semantics moves the result far past the tolerance."""
    case = build(np.random.default_rng(4), [("tree", 30, 40), ("chain", 9, 8)], window=6, softcap=2.0, sinks=True)
    expected = brute_force(case)
    if change == "parents":
        wrong = replace(case, segments=[replace(s, parents=None) for s in case.segments])
    else:
        wrong = replace(case, **{change: None})
    assert worst(case.to(device=DEVICE).run(triton), expected) < 2e-5
    assert worst(wrong.to(device=DEVICE).run(triton), expected) > 1e-2


def test_a_segment_does_not_depend_on_its_batch(triton: AttentionBackend) -> None:
    case = build(np.random.default_rng(5), [("tree", 600, 12), ("decode", 1100, 1), ("chain", 20, 30)])
    case = case.to(device=DEVICE)
    together, at = case.run(triton), 0
    for segment in case.segments:
        rows = slice(at, at + len(segment.tokens))
        alone = replace(case, segments=[segment], q=case.q[rows])
        assert torch.equal(alone.run(triton), together[rows])
        at = rows.stop
