"""Workloads: seeded, rescaled, cut, and with prefixes that are shared where the trace says so."""

from __future__ import annotations

import itertools
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.bench.workloads.arrivals import (
    BLOCK,
    Arrival,
    poisson,
    prompt_of,
    repeated,
    requests,
    rescaled,
    truncated,
    within_context,
)
from headrace.core.errors import InvalidRequest
from headrace.core.request import SLO


def test_poisson_is_seeded_and_has_the_right_moments() -> None:
    arrivals = poisson(5.0, 4000, seed=1, lengths=[(10, 2), (30, 4)], slo=SLO(tpot_ms=50))
    assert arrivals == poisson(5.0, 4000, seed=1, lengths=[(10, 2), (30, 4)], slo=SLO(tpot_ms=50))
    assert arrivals != poisson(5.0, 4000, seed=2, lengths=[(10, 2), (30, 4)], slo=SLO(tpot_ms=50))
    gaps = [b.time_s - a.time_s for a, b in itertools.pairwise(arrivals)]
    assert min(gaps) >= 0
    assert statistics.mean(gaps) == pytest.approx(0.2, rel=0.05)
    assert statistics.pstdev(gaps) == pytest.approx(0.2, rel=0.07), "exponential: deviation equals mean"
    assert statistics.mean(a.prompt_tokens for a in arrivals) == pytest.approx(20, rel=0.05)
    assert {a.slo.tpot_ms for a in arrivals} == {50}


@given(st.lists(st.floats(0, 1e5), min_size=2, max_size=20), st.floats(0.01, 100))
def test_rescaling_keeps_the_pattern(times: list[float], rate: float) -> None:
    arrivals = [Arrival(t, 1, 1) for t in sorted(times)]
    scaled = rescaled(arrivals, rate)
    span = arrivals[-1].time_s - arrivals[0].time_s
    assert scaled[0].time_s == 0
    if span > 1e-6:
        assert scaled[-1].time_s == pytest.approx((len(times) - 1) / rate)
        for before, after in zip(arrivals, scaled, strict=True):
            share = (before.time_s - arrivals[0].time_s) / span
            assert after.time_s == pytest.approx(share * scaled[-1].time_s, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("rate", [0.0, -1.0])
def test_rates_must_be_positive(rate: float) -> None:
    with pytest.raises(InvalidRequest, match="above 0"):
        poisson(rate, 1, seed=0)
    with pytest.raises(InvalidRequest, match="above 0"):
        rescaled([], rate)


def test_truncation() -> None:
    arrivals = [Arrival(float(t), 1, 1) for t in range(10)]
    assert truncated(arrivals, count=3) == arrivals[:3]
    assert truncated(arrivals, seconds=4.5) == arrivals[:5]
    assert truncated(arrivals, count=9, seconds=1.0) == arrivals[:2]
    assert truncated(arrivals) == arrivals


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(2, 4000))
def test_what_is_cut_fits(prompt: int, output: int, context: int) -> None:
    (cut,) = within_context([Arrival(0.0, prompt, output)], context)
    if prompt + output <= context:
        assert (cut.prompt_tokens, cut.output_tokens) == (prompt, output)
    else:
        assert cut.prompt_tokens + cut.output_tokens <= context
        assert 1 <= cut.prompt_tokens <= prompt
        assert 1 <= cut.output_tokens <= output


def test_no_answer_fits_a_context_of_one() -> None:
    with pytest.raises(InvalidRequest, match="at least 2"):
        within_context([], 1)


def test_equal_blocks_are_equal_tokens() -> None:
    one = Arrival(0.0, 2 * BLOCK + 100, 1, blocks=(7, 8, 9))
    two = Arrival(0.0, 2 * BLOCK + 300, 1, blocks=(7, 8, 9))
    other = Arrival(0.0, 2 * BLOCK, 1, blocks=(7, 5))
    a, b, c = (prompt_of(x, i, vocab_size=32_000) for i, x in enumerate((one, two, other)))
    assert [len(x) for x in (a, b, c)] == [one.prompt_tokens, two.prompt_tokens, other.prompt_tokens]
    assert b[: len(a)] == a, "a part of a block is a prefix of it"
    assert c[:BLOCK] == a[:BLOCK]
    assert c[BLOCK:] != a[BLOCK : 2 * BLOCK]


def test_too_few_blocks_are_filled_up_with_tokens_of_its_own() -> None:
    arrival = Arrival(0.0, BLOCK + 50, 1, blocks=(7,))
    a, b = (prompt_of(arrival, number, vocab_size=32_000) for number in (1, 2))
    assert len(a) == BLOCK + 50
    assert a[:BLOCK] == b[:BLOCK]
    assert a[BLOCK:] != b[BLOCK:]


def test_texts_are_tokenised_or_stand_for_the_same_tokens() -> None:
    arrival = Arrival(0.0, 5, 1, text="abc")
    assert prompt_of(arrival, 0, vocab_size=9, tokenize=lambda text: [ord(c) for c in text]) == (97, 98, 99)
    assert prompt_of(arrival, 0, vocab_size=99) == prompt_of(arrival, 1, vocab_size=99)
    assert len(prompt_of(arrival, 0, vocab_size=99)) == 5
    assert prompt_of(Arrival(0.0, 50, 1), 0, vocab_size=99) != prompt_of(Arrival(0.0, 50, 1), 1, vocab_size=99)


def test_requests_carry_everything() -> None:
    slo = SLO(ttft_ms=9.0)
    arrival = Arrival(2.0, 4, 6, slo=slo, category="chat", owner="me", priority=3)
    (request,) = requests([arrival], vocab_size=50, start=10.0)
    assert (request.arrival, request.slo, request.tier, request.owner, request.priority) == (12.0, slo, "chat", "me", 3)
    assert (request.params.max_tokens, request.params.ignore_eos, request.params.greedy) == (6, True, True)
    assert len(request.prompt) == 4
    assert max(request.prompt) < 50


def test_repeating_a_workload_keeps_its_rate_across_the_seams() -> None:
    arrivals = [Arrival(5.0 + t, 10 + t, 1) for t in (0, 1, 2, 3)]
    long = repeated(arrivals, 10.0)
    assert [a.time_s for a in long] == [float(t) for t in range(11)]
    assert [a.prompt_tokens for a in long] == [10 + t % 4 for t in range(11)]
    with pytest.raises(InvalidRequest, match="all come at once"):
        repeated([Arrival(1.0, 1, 1)] * 3, 10.0)
    with pytest.raises(InvalidRequest, match="all come at once"):
        repeated([], 10.0)
