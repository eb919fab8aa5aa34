"""Answers that end in the middle of a verified draft: what a client is told is what it would be told without drafts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.fake import EOS, answer, request
from tests.engine.fake import engine as plain_engine
from tests.engine.test_engine import assert_empty, run, tokens
from tests.engine.test_speculation import speculating
from tests.llm.doubles import CharTokenizer, text_of

from headrace.core.outputs import TokenLogprobs
from headrace.core.request import Request, SamplingParams
from headrace.engine import head as heads
from headrace.engine.engine import Engine
from headrace.engine.sampling.sampler import Draw, Sampled
from headrace.engine.sequence import Sequence as EngineSequence
from headrace.engine.text import TextStream
from headrace.speculation.policies import POLICIES


@dataclass
class Told:
    """What the client of one sequence has learnt."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[tuple[int, float]] = field(default_factory=list)
    finish: tuple[object, object] | None = None


def told(built: Engine, jobs: Sequence[Request]) -> dict[tuple[str, int], Told]:
    """Serve ``jobs`` as a front does: text is cut at stop strings, and whoever has met one is cancelled."""
    _with_logprobs(built)
    params = {job.id: job.params for job in jobs}
    for job in jobs:
        built.add(job)
    streams: dict[tuple[str, int], TextStream] = {}
    found: dict[tuple[str, int], Told] = {}
    while built.busy:
        for delta in built.step():
            key = (delta.request_id, delta.index)
            stream = streams.setdefault(key, TextStream(CharTokenizer(""), params[delta.request_id]))
            mine = found.setdefault(key, Told())
            if mine.finish is not None:
                continue
            part = stream.push(delta)
            mine.text += part.text
            mine.tokens += part.tokens
            mine.logprobs += [(entry.token, entry.logprob) for entry in part.logprobs or []]
            if part.done:
                mine.finish = (part.finish_reason, part.stop_reason)
            if stream.stopped:
                built.cancel(delta.request_id, delta.index)
    assert_empty(built)
    return found


def _with_logprobs(built: Engine) -> None:
    """The fake sampler tells log-probabilities that depend on what was seen, to those who want some."""
    draw_tokens = built.sampler.sample

    def sample(result: object, rows: list[Draw]) -> list[Sampled]:
        drawn = draw_tokens(result, rows)  # type: ignore[arg-type]
        return [
            Sampled(one.token, TokenLogprobs(one.token, -float(sum(result.logits[row.row]) % 97), 1, ()))  # type: ignore[attr-defined]
            if row.params.logprobs is not None
            else one
            for one, row in zip(drawn, rows, strict=True)
        ]

    built.sampler.sample = sample  # type: ignore[method-assign]


@st.composite
def jobs(draw: st.DrawFn) -> list[Request]:
    """Requests with stop strings and stop tokens out of their own answers, wherever in a step they may fall."""
    made = []
    for number in range(draw(st.integers(1, 5))):
        prompt = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=20)))
        params = SamplingParams(
            n=draw(st.integers(1, 3)), seed=number, max_tokens=draw(st.integers(1, 30)), ignore_eos=draw(st.booleans())
        )
        whole = answer(Request("", prompt, params.with_(max_tokens=30, ignore_eos=True)))
        stops = []
        for _ in range(draw(st.integers(0, 2))):
            start = draw(st.integers(0, 28))
            text = text_of(whole[start : start + draw(st.integers(1, 4))])
            stops += [text] if text else []
        params = params.with_(
            stop=tuple(stops),
            stop_token_ids=tuple(draw(st.lists(st.sampled_from(whole), max_size=1))),
            include_stop=draw(st.booleans()),
            min_tokens=draw(st.integers(0, params.max_tokens or 0)),
            logprobs=draw(st.sampled_from([None, 0])),
        )
        made.append(Request(f"r{number}", prompt, params, speculate=draw(st.sampled_from([None, True, False]))))
    return made


@settings(max_examples=150, deadline=None)
@given(jobs=jobs(), policy=st.sampled_from(["anything", *POLICIES]), skill=st.sampled_from([0.0, 0.6, 1.0]))
def test_a_client_is_told_the_same(jobs: list[Request], policy: str, skill: float) -> None:
    """Text, tokens, log-probabilities, finish and stop reason of every sequence, under any policy and any drafts."""
    built = speculating(skill, None if policy == "anything" else POLICIES[policy]())
    assert told(built, jobs) == told(plain_engine(), jobs)


def test_a_stop_string_across_two_tokens_of_one_commit() -> None:
    job = request("a", [1, 2, 3], max_tokens=40, ignore_eos=True)
    whole = answer(job)
    stop = text_of(whole[4:6])
    stopping = request("a", [1, 2, 3], max_tokens=40, ignore_eos=True, stop=(stop,), logprobs=0)
    built = speculating(1.0, POLICIES["spec-8"]())
    mine = told(built, [stopping])["a", 0]
    assert mine == told(plain_engine(), [stopping])["a", 0]
    assert mine.text == text_of(whole).split(stop)[0]
    assert mine.finish == ("stop", stop)
    assert [token for token, _ in mine.logprobs] == mine.tokens
    assert built.stats().accepted > len(mine.tokens), "the commit went on behind the stop string"


@pytest.mark.parametrize("most", [1, 2, 5, 6, 7])
def test_the_token_limit_is_met_exactly(most: int) -> None:
    built = speculating(1.0, POLICIES["spec-8"]())
    built.add(request("a", [1, 2, 3], max_tokens=most, ignore_eos=True))
    deltas = run(built)["a", 0]
    assert len(tokens(deltas)) == most
    assert (deltas[-1].reason, deltas[-1].timing.decoded) == ("length", most)  # type: ignore[union-attr]
    assert_empty(built)


def test_end_of_text_in_the_middle_of_a_commit() -> None:
    job = next(
        job
        for job in (request("a", [1, n], seed=n, max_tokens=60) for n in range(1, 200))
        if 4 < len(answer(job)) < 40 and answer(job)[-1] == EOS and len(answer(job)) % 9 != 1
    )
    built = speculating(1.0, POLICIES["spec-8"]())
    built.add(job)
    deltas = run(built)["a", 0]
    assert tokens(deltas) == answer(job)
    assert (deltas[-1].reason, deltas[-1].stop_token) == ("stop", EOS)
    assert built.stats().accepted > 0
    assert_empty(built)


def test_a_cancel_between_draft_and_end_frees_everything() -> None:
    built = speculating(1.0, POLICIES["spec-8"]())
    built.add(request("a", [1, 2, 3], max_tokens=60, ignore_eos=True, n=2))
    while built.stats().accepted == 0:
        built.step()
    built.cancel("a")
    reasons = [delta.reason for delta in built.step()]
    assert reasons == ["abort", "abort"]
    assert_empty(built)


def test_an_end_that_is_noticed_too_late_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a walk that goes on behind a stop token tells the client more than it should."""
    whole = answer(request("a", [1, 2, 3], max_tokens=40, ignore_eos=True))
    job = request("a", [1, 2, 3], max_tokens=40, ignore_eos=True, stop_token_ids=[whole[7]])
    expected = told(plain_engine(), [job])
    on_time = heads._reason

    def late(sequence: EngineSequence, token: int) -> object:
        before = sequence.output[-2] if len(sequence.output) > 1 else token
        return on_time(sequence, before)

    monkeypatch.setattr(heads, "_reason", late)
    assert told(speculating(1.0, POLICIES["spec-8"]()), [job]) != expected
