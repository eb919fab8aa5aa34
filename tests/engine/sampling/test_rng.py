"""The counter-based generator: keyed, uniform, without overlap between streams."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.engine.sampling.rng import mix64, random_seed, stream_key, uniform


def test_mixer_matches_published_splitmix64() -> None:
    """First outputs of splitmix64 seeded with 0: finaliser over multiples of the golden gamma."""
    golden = 0x9E3779B97F4A7C15
    assert [mix64(i * golden) for i in (1, 2, 3)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@given(st.integers(-(1 << 63), (1 << 63) - 1), st.integers(0, 1 << 31))
def test_range_and_repeatability(seed: int, index: int) -> None:
    key = stream_key(seed, 3)
    assert 0 <= key < 1 << 64
    u = uniform(key, index)
    assert 0.0 <= u < 1.0
    assert u == uniform(stream_key(seed, 3), index)
    assert (u * 2**53).is_integer()


def test_streams_of_neighbouring_seeds_and_sequences_differ() -> None:
    keys = {stream_key(seed, index) for seed in range(-50, 50) for index in range(50)}
    assert len(keys) == 5000
    values = {uniform(key, index) for key in list(keys)[:100] for index in range(50)}
    assert len(values) == 5000


@pytest.mark.parametrize("lag", [0, 1, 7])
def test_uniform_and_uncorrelated_over_indices_and_over_keys(lag: int) -> None:
    count = 20_000
    key = stream_key(1)
    along = [uniform(key, i) for i in range(count + lag)]
    across = [uniform(stream_key(i), 0) for i in range(count + lag)]
    for values in (along, across):
        bins = [0] * 100
        for value in values[:count]:
            bins[int(value * 100)] += 1
        chi2 = sum((n - count / 100) ** 2 / (count / 100) for n in bins)
        assert chi2 < 99 + 5 * math.sqrt(2 * 99)
        if lag:
            covariance = sum((a - 0.5) * (b - 0.5) for a, b in zip(values, values[lag:], strict=False)) / count
            assert abs(covariance) * 12 < 5 / math.sqrt(count)


def test_fresh_seeds_are_valid_and_differ() -> None:
    seeds = {random_seed() for _ in range(100)}
    assert len(seeds) == 100
    assert all(0 <= seed < 1 << 63 for seed in seeds)
