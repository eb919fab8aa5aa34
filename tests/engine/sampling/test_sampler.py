"""The sampler against a naive float64 one, its statistics, its independence of the batch, and its failures."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.engine import naive

from headrace.core.errors import InvalidRequest
from headrace.core.protocols import StepResult
from headrace.core.request import SamplingParams
from headrace.engine.sampling import distribution
from headrace.engine.sampling.rng import stream_key, uniform
from headrace.engine.sampling.sampler import Draw, Sampled, TorchSampler

TIE = 1e-5  # share of u within which float32 weights may fall on the other side of a border


def sample(logits: Any, *draws: Draw) -> list[Sampled]:
    return TorchSampler().sample(StepResult(torch.as_tensor(np.asarray(logits, np.float32))), draws)


def token(logits: Any, draw: Draw) -> int:
    (outcome,) = sample(logits, draw)
    assert outcome.error is None
    return outcome.token


def draw(row: int = 0, *, seed: int = 0, index: int = 0, **params: Any) -> Draw:
    return Draw(row, SamplingParams(**params), stream_key(seed), index)


class Allowed:
    """A grammar that allows a fixed set of tokens."""

    def __init__(self, *tokens: int) -> None:
        self.tokens = tokens

    def fill(self, words: NDArray[np.int32]) -> bool:
        words[:] = 0
        for allowed in self.tokens:
            words.view(np.uint32)[allowed // 32] |= np.uint32(1 << (allowed % 32))
        return True


SIZES = st.sampled_from([2, 3, 31, 33, 255, 256, 257, 600])
PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.05, 0.7, 1.0, 3.0]),
    top_p=st.sampled_from([1.0, 0.99, 0.9, 0.5, 0.01]),
    top_k=st.sampled_from([0, -1, 1, 2, 5, 40, 10_000]),
    min_p=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
    presence_penalty=st.sampled_from([0.0, 0.5, -0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.25, -0.25]),
    logit_bias=st.dictionaries(st.integers(0, 1), st.sampled_from([-2.0, 1.5]), max_size=2),
    max_tokens=st.none(),
)


@settings(deadline=None, max_examples=400)
@given(
    size=SIZES,
    params=PARAMS,
    seed=st.integers(0, 2**32),
    index=st.integers(0, 50),
    spread=st.sampled_from([0.0, 0.5, 4.0]),
    data=st.data(),
)
def test_equals_the_naive_sampler(
    size: int, params: SamplingParams, seed: int, index: int, spread: float, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    row = np.round(rng.normal(0, spread, size), 1).astype(np.float32)  # rounding makes ties
    row[rng.random(size) < 0.1] = -np.inf
    row[size // 2] = 1.0
    prompt = data.draw(st.lists(st.integers(0, size - 1), max_size=5))
    output = data.draw(st.lists(st.integers(0, size - 1), max_size=8))
    banned = (0,) if data.draw(st.booleans()) else ()
    params = replace(params, min_tokens=index + 1 if banned else 0)
    made = Draw(0, params, stream_key(seed), index, prompt, output, banned)
    got = token([row], made)
    expected = naive.processed(row, params, prompt, output, banned)
    p = naive.distribution([np.float32(x) for x in expected], params)
    wanted, margin = naive.pick(p, uniform(made.seed, index))
    if got != wanted:
        assert margin < TIE or close_to_a_cut(expected, params, got, wanted)
    assert math.isfinite(expected[got])


def close_to_a_cut(row: list[float], params: SamplingParams, got: int, wanted: int) -> bool:
    """Whether moving a filter's edge by rounding error moves a token over it, which shifts the whole inverse."""
    if params.temperature == 0 or params.top_k == 1:
        return abs(row[got] - row[wanted]) < 1e-5
    moved = [
        replace(params, top_p=min(1.0, max(1e-9, params.top_p + d)), min_p=min(1.0, max(0.0, params.min_p + d)))
        for d in (1e-6, -1e-6)
    ]
    supports = [tuple(x > 0 for x in naive.distribution(row, m)) for m in moved]
    return len(set(supports)) > 1


MIXES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"top_p": 0.8},
    {"top_k": 5},
    {"min_p": 0.1},
    {"temperature": 1.5, "top_p": 0.9, "top_k": 12, "min_p": 0.02},
    {
        "repetition_penalty": 1.5,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.3,
        "logit_bias": {3: 2.0},
        "top_p": 0.95,
    },
]


def chi_square(observed: Counter[int], p: list[float], count: int) -> float:
    """Deviations from the mean of chi-square in its standard deviations; infinite when something impossible was drawn."""
    if any(p[t] == 0 for t in observed):
        return math.inf
    cells = [(observed[t], share * count) for t, share in enumerate(p) if share * count >= 5]
    rest = count - sum(n for n, _ in cells), count - sum(e for _, e in cells)
    cells += [rest] if rest[1] >= 5 else []
    freedom = len(cells) - 1
    statistic = sum((n - e) ** 2 / e for n, e in cells)
    return (statistic - freedom) / math.sqrt(2 * freedom)


def frequencies(
    row: Any, params: dict[str, Any], prompt: list[int], output: list[int], count: int, seed: int
) -> Counter[int]:
    sampler, result = TorchSampler(), StepResult(torch.as_tensor(row)[None])
    made = SamplingParams(**params)
    key = stream_key(seed)
    draws = [Draw(0, made, key, i, prompt, output) for i in range(count)]
    return Counter(outcome.token for outcome in sampler.sample(result, draws))


@pytest.mark.parametrize("params", MIXES)
def test_two_hundred_thousand_draws_follow_the_distribution(params: dict[str, Any]) -> None:
    row = np.random.default_rng(7).normal(0, 1.5, 24).astype(np.float32)
    prompt, output, count = [1, 2, 3], [3, 3, 5], 200_000 // len(MIXES) + 1
    p = naive.distribution(naive.processed(row, SamplingParams(**params), prompt, output), SamplingParams(**params))
    observed = frequencies(row, params, prompt, output, count, 11)
    assert abs(chi_square(observed, p, count)) < 5
    wrong = naive.distribution(naive.processed(row, SamplingParams(), prompt, output), SamplingParams(temperature=1.1))
    assert chi_square(observed, wrong, count) > 10, "negative control: a slightly different distribution is told apart"


def test_bitwise_the_same_in_any_batch() -> None:
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(0, 2, (12, 1003)).astype(np.float32))
    draws = [
        Draw(i % 12, SamplingParams(**params, logprobs=3), stream_key(i), i, [1, 2], [3, 4, i], (0,))
        for i, params in enumerate([*MIXES, {"temperature": 0.0}] * 3)
    ]
    alone = [
        TorchSampler().sample(StepResult(logits[d.row : d.row + 1].clone()), [replace(d, row=0)])[0] for d in draws
    ]
    sampler = TorchSampler()
    for order in (range(len(draws)), reversed(range(len(draws))), rng.permutation(len(draws))):
        places = list(order)
        together = sampler.sample(StepResult(logits), [draws[i] for i in places])
        assert together == [alone[i] for i in places]


def test_forks_share_a_row_and_differ_by_key() -> None:
    row = np.zeros((1, 5000), np.float32)
    tokens = [o.token for o in sample(row, *(Draw(0, SamplingParams(), stream_key(7, i), 0) for i in range(4)))]
    assert len(set(tokens)) == 4
    assert tokens == [o.token for o in sample(row, *(Draw(0, SamplingParams(), stream_key(7, i), 0) for i in range(4)))]


@pytest.mark.parametrize("params", [{}, {"top_p": 0.999}, {"top_k": 3}])
@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2.0**-53])
def test_ends_of_the_unit_interval_never_give_impossible_tokens(
    params: dict[str, Any], u: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.engine.sampling.sampler.uniform", lambda key, index: u)
    row = np.full(700, -np.inf, np.float32)
    row[[3, 300, 650]] = [0.0, 1.0, -1.0]
    expected = {0.0: 3, 0.5: 300, 1 - 2.0**-53: 650}[u]
    assert token([row], draw(**params)) == expected


def test_sums_of_any_scale_stay_inside() -> None:
    for scale in (1e-38, 1e-20, 1.0, 1e30):
        weights = np.zeros(512, np.float32)
        weights[[5, 400]] = scale
        assert distribution.draw(weights, 0.0) == 5
        assert distribution.draw(weights, 1 - 2.0**-53) == 400


@pytest.mark.parametrize(
    "params", [{"temperature": 0.0}, {"temperature": 1e-7}, {"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}]
)
def test_ways_to_be_greedy(params: dict[str, Any]) -> None:
    row = np.random.default_rng(3).normal(0, 1, (1, 300)).astype(np.float32)
    assert {token(row, draw(index=i, **params)) for i in range(20)} == {int(row.argmax())}


def test_ties_go_to_the_lowest_id() -> None:
    row = np.zeros((1, 300), np.float32)
    assert token(row, draw(temperature=0.0)) == 0
    assert {token(row, draw(index=i, top_k=3)) for i in range(200)} == {0, 1, 2}
    assert {token(row, draw(index=i, top_p=0.01)) for i in range(200)} == {0, 1, 2}
    assert {token(row, draw(index=i, min_p=1.0)) for i in range(3000)} == set(range(300)), "min-p keeps equals"


def test_penalties_read_prompt_and_output_as_defined() -> None:
    row = np.array([[2.0, 2.1, -1.0, 1.9]], np.float32)

    def best(prompt: list[int], output: list[int], **params: Any) -> int:
        return token(row, Draw(0, SamplingParams(temperature=0.0, **params), 0, 0, prompt, output))

    assert best([1], [], repetition_penalty=1.2) == 0, "the prompt counts for repetition"
    assert best([1], [], presence_penalty=2.0, frequency_penalty=2.0) == 1, "but not for presence and frequency"
    assert best([], [1], presence_penalty=0.15) == 0
    assert best([], [1], frequency_penalty=0.06) == 1
    assert best([], [1, 1], frequency_penalty=0.06) == 0
    assert best([], [], logit_bias={2: 5.0}) == 2
    assert best([], [], logit_bias={99: 5.0}) == 1, "ids outside the vocabulary are ignored"
    assert best([99], [99], repetition_penalty=1.2) == 1


def test_history_follows_a_growing_and_a_shrinking_output() -> None:
    sampler, row = TorchSampler(), StepResult(torch.tensor([[1.0, 0.9, 0.8, 0.7]]))
    output: list[int] = []
    made = Draw(0, SamplingParams(temperature=0.0, frequency_penalty=0.5), 0, 0, [], output)
    seen = []
    for _ in range(6):
        (outcome,) = sampler.sample(row, [made])
        fresh = TorchSampler().sample(row, [replace(made, output=list(output))])
        assert outcome == fresh[0]
        seen.append(outcome.token)
        output.append(outcome.token)
    assert seen == [0, 1, 2, 3, 0, 1]
    del output[2:]
    assert sampler.sample(row, [made])[0].token == 2


def test_histories_are_not_confused_between_sequences() -> None:
    sampler, row = TorchSampler(), StepResult(torch.tensor([[1.0, 0.9, 0.8]]))
    for i in range(3000):
        output = [i % 3]
        (outcome,) = sampler.sample(
            row, [Draw(0, SamplingParams(temperature=0.0, presence_penalty=1.0), 0, 0, [], output)]
        )
        assert outcome.token == (1 if i % 3 == 0 else 0)


def test_min_tokens_bans_stop_ids_until_then() -> None:
    row = np.array([[5.0, 1.0, 4.0]], np.float32)
    params = SamplingParams(temperature=0.0, min_tokens=2)
    picks = [token(row, Draw(0, params, 0, index, [], [], (0, 2, 77))) for index in range(3)]
    assert picks == [1, 1, 0]


def test_a_grammar_masks_and_wins_over_min_tokens() -> None:
    row = np.random.default_rng(0).normal(0, 1, (1, 100)).astype(np.float32)
    params = SamplingParams(min_tokens=5)
    picks = {token(row, replace(draw(index=i), params=params, grammar=Allowed(40, 41, 99))) for i in range(50)}
    assert picks == {40, 41, 99}
    ended = Draw(0, params, 0, 0, [], [], (7,), Allowed(7))
    assert token(row, ended) == 7
    open_ended = Draw(0, params, 0, 0, [], [], (7,), Allowed(7, 8))
    assert token(row, open_ended) == 8


def test_nothing_allowed_is_an_error_of_that_row() -> None:
    outcomes = sample(np.zeros((2, 40)), replace(draw(0), grammar=Allowed()), draw(1, temperature=0.0))
    assert isinstance(outcomes[0].error, InvalidRequest)
    assert outcomes[0].token == -1
    assert outcomes[1] == Sampled(0)


@pytest.mark.parametrize("params", [*MIXES, {"temperature": 0.0}, {"temperature": 0.0, "logprobs": 2}, {"logprobs": 1}])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_logits_fail_alone(params: dict[str, Any], bad: float) -> None:
    logits = np.zeros((3, 64), np.float32)
    logits[:, 9] = 9.0
    logits[1, :] = bad if bad == -math.inf else 0.0
    logits[1, 5] = bad
    outcomes = sample(logits, *(draw(i, **params) for i in range(3)))
    assert [o.error is not None for o in outcomes] == [False, True, False]
    assert outcomes[1].error is not None
    assert outcomes[1].error.code == "invalid_logits"
    assert outcomes[1].token == -1
    assert outcomes[0].token >= 0


def test_logprobs_are_of_the_raw_logits() -> None:
    row = np.random.default_rng(5).normal(0, 3, (1, 500)).astype(np.float32)
    reference = torch.log_softmax(torch.from_numpy(row[0]).double(), -1)
    params = {"temperature": 0.3, "top_k": 10, "repetition_penalty": 1.7, "logit_bias": {3: 9.0}}
    for index in range(10):
        (outcome,) = sample(row, Draw(0, SamplingParams(**params, logprobs=5), 0, index, [1, 2, 3], [4], ()))
        found = outcome.logprobs
        assert found is not None
        assert found.token == outcome.token
        assert found.logprob == pytest.approx(float(reference[outcome.token]), abs=1e-5)
        assert found.rank == int((row[0] > row[0, outcome.token]).sum()) + 1
        values, ids = reference.topk(5)
        assert [token for token, _ in found.top] == ids.tolist()
        assert [value for _, value in found.top] == pytest.approx(values.tolist(), abs=1e-5)


def test_logprobs_edges() -> None:
    (none,), (bare,), (all_,) = (
        sample([[1.0, 1.0, 0.0]], draw(temperature=0.0, logprobs=n)) for n in (None, 0, 20)
    )  # fmt: skip
    assert none.logprobs is None
    assert bare.logprobs is not None
    assert (bare.logprobs.top, bare.logprobs.rank) == ((), 1)
    assert all_.logprobs is not None
    assert [token for token, _ in all_.logprobs.top] == [0, 1, 2], "ties by id, cut to the vocabulary"


def test_logits_of_other_dtypes_are_taken_and_left_alone() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0]], dtype=torch.bfloat16)
    made = Draw(0, SamplingParams(temperature=0.0, logit_bias={1: -5.0}), 0, 0)
    assert TorchSampler().sample(StepResult(logits), [made])[0].token == 2
    kept = torch.tensor([[0.0, 2.0, 1.0]])
    assert TorchSampler().sample(StepResult(kept), [made])[0].token == 2
    assert kept.tolist() == [[0.0, 2.0, 1.0]]


def test_no_rows() -> None:
    assert TorchSampler().sample(StepResult(torch.zeros(0, 5)), []) == []


def test_device_path_agrees_with_the_host() -> None:
    """The path for accelerators, driven with tensors of this machine."""
    rng = np.random.default_rng(1)
    logits = torch.from_numpy(rng.normal(0, 2, (6, 200)).astype(np.float32))
    logits[2, 5] = math.nan
    draws = [
        draw(i, seed=i, **({"temperature": 0.0} if i % 2 == 0 else {"top_p": 0.9, "logprobs": 2})) for i in range(6)
    ]
    draws += [draw(1, seed=9), draw(0, temperature=0.0, logprobs=1), draw(0, temperature=0.0)]
    sampler = TorchSampler()
    host, device = sampler.sample(StepResult(logits), draws), sampler._from_device(logits, draws)
    assert [(o.token, o.logprobs, o.error is None) for o in host] == [
        (o.token, o.logprobs, o.error is None) for o in device
    ]
    plain = [draw(i, temperature=0.0) for i in range(6)]
    assert [o.token for o in sampler._from_device(logits, plain)] == [
        o.token for o in sampler.sample(StepResult(logits), plain)
    ]
