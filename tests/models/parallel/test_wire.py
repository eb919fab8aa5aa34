"""A batch comes out of the wire as it went in."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models.attention_cases import Case, cases

from headrace.core.batch import Batch
from headrace.models.parallel import wire


def assert_same(found: Batch, sent: Batch) -> None:
    assert found.shape == sent.shape
    for name in wire._ARRAYS:
        assert np.array_equal(getattr(found, name), getattr(sent, name)), name


@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_there_and_back(case: Case) -> None:
    batch = case.batch
    assert_same(wire.unpack(wire.pack(batch)), batch)


@given(attended=st.integers(0, 1 << 60))
def test_numbers_beyond_32_bits(attended: int) -> None:
    batch = build_batch()
    batch = replace(batch, shape=replace(batch.shape, attended=attended))
    assert wire.unpack(wire.pack(batch)).shape.attended == attended


def build_batch() -> Batch:
    from tests.models.attention_cases import build

    return build(np.random.default_rng(0), [("tree", 3, 5), ("decode", 2, 1)]).batch


def test_every_array_of_a_batch_travels() -> None:
    """A field added to Batch and forgotten here would reach rank 0 alone. Ranks retrieve nothing, so ``retrieving`` stays."""
    assert set(Batch.__dataclass_fields__) == {*wire._ARRAYS, "shape", "retrieving"}
