"""The reference backend and the registry."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from tests.models.attention_cases import Case, brute_force, build, cases, worst

from headrace.core.errors import InvalidRequest
from headrace.models.attention import BACKENDS, get_backend

REFERENCE = get_backend("reference", "cpu")


@settings(max_examples=60, deadline=None)
@given(cases())
def test_equals_the_definition(case: Case) -> None:
    assert worst(case.run(REFERENCE), brute_force(case)) < 1e-5
    coded = case.coded()
    assert worst(coded.run(REFERENCE), brute_force(coded)) < 1e-3


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
def test_half_precision_planes(dtype: torch.dtype, limit: float) -> None:
    case = build(np.random.default_rng(0), [("tree", 40, 33), ("decode", 64, 1)], softcap=3.0, sinks=True).to(
        dtype=dtype
    )
    assert case.run(REFERENCE).dtype == dtype
    assert worst(case.run(REFERENCE), brute_force(case)) < limit


@pytest.mark.parametrize("change", ["window", "softcap", "sinks", "parents", "positions"])
def test_what_the_options_change_is_seen(change: str) -> None:
    """Negative control: leaving out any part of the semantics moves the result far past the tolerance."""
    case = build(np.random.default_rng(1), [("tree", 30, 12), ("chain", 9, 8)], window=6, softcap=2.0, sinks=True)
    expected = brute_force(case)
    if change == "parents":
        wrong = replace(case, segments=[replace(s, parents=None) for s in case.segments])
    elif change == "positions":
        flat = [replace(s, positions=np.arange(len(s.tokens), dtype=np.int32) + 30) for s in case.segments]
        wrong = replace(case, segments=flat)
    else:
        wrong = replace(case, **{change: None})
    assert worst(case.run(REFERENCE), expected) < 1e-5
    assert worst(wrong.run(REFERENCE), expected) > 1e-2


def test_registry_names_the_choices() -> None:
    with pytest.raises(InvalidRequest, match="auto, reference, numba, triton") as caught:
        get_backend("flash", "cpu")
    assert caught.value.field == "attention"


def test_auto_takes_the_fast_path_of_the_device() -> None:
    assert get_backend("auto", torch.device("cpu")).name == "numba"
    assert get_backend("auto", "meta").name == "reference"
    assert set(BACKENDS) == {"reference", "numba", "triton"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_triton_without_cuda_says_so() -> None:
    with pytest.raises(InvalidRequest, match="choose auto or reference"):
        get_backend("triton", "cpu")
