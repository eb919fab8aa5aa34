"""The step loop against a model that hashes what it sees through the slots: any mix-up changes the text."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.fake import EOS, answer, engine, request

from headrace.core.errors import ContextTooLong, HeadraceError, InvalidRequest, OutOfMemory
from headrace.core.outputs import SequenceDelta
from headrace.core.request import Request, SamplingParams
from headrace.core.speculation import DraftTree
from headrace.engine.engine import Engine
from headrace.engine.head import Head
from headrace.engine.sampling.sampler import Sampled
from headrace.engine.sequence import Sequence

Answers = dict[tuple[str, int], list[SequenceDelta]]


def run(built: Engine, steps: int = 10_000) -> Answers:
    """Step until nothing is open; deltas by (request, sequence)."""
    out: Answers = defaultdict(list)
    while built.busy:
        steps -= 1
        assert steps > 0, "the engine does not come to an end"
        for delta in built.step():
            out[delta.request_id, delta.index].append(delta)
    return out


def tokens(deltas: list[SequenceDelta]) -> list[int]:
    return [t for d in deltas for t in d.tokens]


def assert_empty(built: Engine) -> None:
    """No slot is held by anybody but the prefix cache, and clearing that frees them all."""
    stats = built.stats()
    assert (stats.running, stats.waiting) == (0, 0)
    assert stats.slots_free + stats.slots_cached == stats.slots_total
    if built.space.radix is not None:
        built.space.radix.clear()
    assert built.space.pool.free == built.space.pool.size


prompts = st.lists(st.integers(1, 5), min_size=1, max_size=40)
jobs = st.lists(st.tuples(prompts, st.integers(1, 25), st.integers(1, 3), st.integers(0, 2)), min_size=1, max_size=10)


@settings(max_examples=120, deadline=None)
@given(
    jobs=jobs,
    policy=st.sampled_from(["chunked", "prefill-first"]),
    prefix_cache=st.booleans(),
    slots=st.sampled_from([70, 90, 150, 400]),
    budget=st.sampled_from([8, 9, 17, 64]),
    prefill=st.sampled_from([5, 33, 200]),
    stagger=st.integers(0, 4),
    cancels=st.sets(st.integers(0, 9), max_size=3),
)
def test_answers_never_depend_on_company(jobs, policy, prefix_cache, slots, budget, prefill, stagger, cancels) -> None:
    """Any policy, chunk size, packing, preemption, prefix reuse, n and cancel of neighbours: the same tokens."""
    built = engine(slots, policy=policy, prefix_cache=prefix_cache, max_step_tokens=budget, max_prefill_tokens=prefill)
    requests = [
        Request(f"r{i}", tuple(p), SamplingParams(n=n, max_tokens=m, seed=i), priority=pr)
        for i, (p, m, n, pr) in enumerate(jobs)
    ]
    out: Answers = defaultdict(list)
    for i, job in enumerate(requests):
        built.add(job)
        for _ in range(stagger):
            for delta in built.step():
                out[delta.request_id, delta.index].append(delta)
        if i in cancels:
            built.cancel(f"r{i}")
    for key, deltas in run(built).items():
        out[key] += deltas
    for i, job in enumerate(requests):
        for index in range(job.params.n):
            deltas = out[job.id, index]
            assert [d.reason for d in deltas[:-1]] == [None] * (len(deltas) - 1)
            expected = answer(job, index)
            got = tokens(deltas)
            if deltas[-1].reason == "abort":
                assert i in cancels
                assert got == expected[: len(got)]
            else:
                assert got == expected
                assert deltas[-1].reason == ("stop" if expected[-1] == EOS else "length")
    assert_empty(built)


def test_the_fake_model_notices_a_wrong_slot() -> None:
    """Negative control: one entry of a slot table exchanged changes the text."""
    job = request("a", [1, 2, 3, 4], max_tokens=6, ignore_eos=True)
    built = engine(prefix_cache=False)
    built.add(job)
    got = tokens(built.step())
    sequence = next(iter(built._running.values()))
    runner = built.runner
    (stray,) = built.space.reserve(1)
    runner.positions[stray], runner.tokens[stray] = 1, 66
    sequence.slots[1] = stray
    got += tokens(run(built)["a", 0])
    assert len(got) == 6
    assert got != answer(job)


def test_preemption_happens_and_is_counted() -> None:
    built = engine(60, prefix_cache=False)
    jobs = [request(f"r{i}", [i + 1] * 10, max_tokens=30, ignore_eos=True) for i in range(4)]
    for job in jobs:
        built.add(job)
    out = run(built)
    assert built.stats().preemptions > 0
    assert sum(out[j.id, 0][-1].timing.preemptions for j in jobs) == built.stats().preemptions
    for job in jobs:
        assert tokens(out[job.id, 0]) == answer(job)


def test_what_a_preempted_request_finds_of_its_own_does_not_count_as_cached() -> None:
    built = engine(60)
    jobs = [request(f"r{i}", [i + 1] * 10, max_tokens=30, ignore_eos=True) for i in range(4)]
    for job in jobs:
        built.add(job)
    timings = [deltas[-1].timing for deltas in run(built).values()]
    assert max(t.preemptions for t in timings) > 0
    assert [t.cached_tokens for t in timings] == [0] * 4
    assert built.stats().cached_tokens == 0


def test_one_sequence_may_use_the_whole_pool() -> None:
    """Never below one running request: the last one is not preempted and reaches the end of the pool."""
    built = engine(64)
    job = request("a", [1] * 10, max_tokens=54, ignore_eos=True)
    built.add(job)
    assert tokens(run(built)["a", 0]) == answer(job)


@settings(max_examples=80, deadline=None)
@given(
    jobs=st.lists(
        st.tuples(st.integers(0, 30), st.integers(1, 30), st.integers(1, 4), st.integers(-1, 1)), min_size=2, max_size=8
    ),
    policy=st.sampled_from(["chunked", "prefill-first"]),
    budget=st.sampled_from([8, 11, 40]),
    stagger=st.integers(0, 3),
)
def test_a_pool_that_is_far_too_small_only_slows_down(jobs, policy, budget, stagger) -> None:
    """Common prefixes, priorities and forks in a pool of one context: everybody ends, with the right answer."""
    built = engine(62, policy=policy, max_step_tokens=budget, max_prefill_tokens=budget)
    requests = [
        Request(f"r{i}", (3,) * shared + (i,), SamplingParams(n=n, max_tokens=m, seed=i, ignore_eos=True), priority=p)
        for i, (shared, m, n, p) in enumerate(jobs)
    ]
    out: Answers = defaultdict(list)
    for job in requests:
        built.add(job)
        for _ in range(stagger):
            for delta in built.step():
                out[delta.request_id, delta.index].append(delta)
    for key, deltas in run(built, 5_000).items():
        out[key] += deltas
    for job in requests:
        for index in range(job.params.n):
            assert tokens(out[job.id, index]) == answer(job, index)
    assert_empty(built)


def test_a_copy_of_a_published_prefix_does_not_block_the_last_sequence() -> None:
    """Two compute the same prefix in one step; the tree keeps one copy, which the owner of the other must not pin for ever."""
    built = engine(64)
    first, last = (
        request("a", [1] * 10 + [3], max_tokens=2),
        request("b", [1] * 10 + [2], max_tokens=53, ignore_eos=True),
    )
    built.add(first)
    built.add(last)
    assert tokens(run(built, 200)["b", 0]) == answer(last)
    assert_empty(built)


def test_the_less_urgent_never_preempts_the_more_urgent() -> None:
    built = engine(64, max_step_tokens=8, prefix_cache=False)
    built.add(Request("later", (1,) * 10, SamplingParams(max_tokens=54, seed=1, ignore_eos=True), priority=5))
    built.step()
    built.step()
    built.add(Request("urgent", (2,) * 50, SamplingParams(max_tokens=5, seed=1, ignore_eos=True), priority=0))
    ends = [d for deltas in run(built).values() for d in deltas if d.reason]
    assert [(d.request_id, d.timing.preemptions) for d in ends] == [("later", 1), ("urgent", 0)]
    assert ends[1].timing.last_token < ends[0].timing.last_token


def test_prefix_is_reused_and_counted() -> None:
    built = engine()
    prompt = [1, 2, 3, 4, 5] * 4
    built.add(request("a", prompt, max_tokens=3, ignore_eos=True))
    run(built)
    before = sum(built.runner.batches)
    built.add(request("b", prompt, max_tokens=3, ignore_eos=True))
    out = run(built)
    assert out["b", 0][-1].timing.cached_tokens == len(prompt) - 1
    assert sum(built.runner.batches) - before == 3


def test_salt_separates_prefixes() -> None:
    built = engine()
    prompt = [1, 2, 3, 4, 5] * 4
    for name, salt in (("a", ""), ("b", "other")):
        built.add(Request(name, tuple(prompt), SamplingParams(max_tokens=2, seed=7), cache_salt=salt))
        out = run(built)
        assert out[name, 0][-1].timing.cached_tokens == 0


def test_priorities_run_first() -> None:
    built = engine(max_sequences=1, max_step_tokens=8)
    for name, priority in (("late", 5), ("soon", -1), ("mid", 0)):
        built.add(Request(name, (1, 2), SamplingParams(max_tokens=2, seed=1, ignore_eos=True), priority=priority))
    order = [
        d.request_id for deltas in iter(lambda: built.step() if built.busy else None, None) for d in deltas if d.reason
    ]
    assert order == ["soon", "mid", "late"]


def test_decodes_are_not_stalled_by_a_long_prompt() -> None:
    """Chunked: the running answer advances every step while a long prompt comes in; prefill-first: it waits."""
    progress = {}
    for policy in ("chunked", "prefill-first"):
        built = engine(400, policy=policy, max_step_tokens=16, max_prefill_tokens=16)
        built.add(request("short", [1, 2], max_tokens=30, ignore_eos=True))
        built.step()
        built.add(request("long", [3] * 100, max_tokens=1))
        count = 0
        while True:
            deltas = built.step()
            count += sum(len(d.tokens) for d in deltas if d.request_id == "short")
            if any(d.request_id == "long" for d in deltas):
                break
        progress[policy] = count
    assert progress["chunked"] >= 6
    assert progress["prefill-first"] == 0


def test_out_of_memory_shrinks_the_step_and_loses_nothing() -> None:
    built = engine(400, largest=20, max_step_tokens=64, max_prefill_tokens=64)
    jobs = [request(f"r{i}", [i + 1] * 30, max_tokens=5, ignore_eos=True) for i in range(4)]
    for job in jobs:
        built.add(job)
    out = run(built)
    for job in jobs:
        assert tokens(out[job.id, 0]) == answer(job)
    assert_empty(built)


def test_hopeless_memory_ends_requests_with_an_error_not_the_engine() -> None:
    built = engine(400, largest=0)
    built.add(request("a", [1, 2, 3], max_tokens=5))
    out = run(built)
    assert out["a", 0][-1].reason == "error"
    assert isinstance(out["a", 0][-1].error, OutOfMemory)
    built.runner.largest = None
    job = request("b", [1, 2, 3], max_tokens=5)
    built.add(job)
    assert tokens(run(built)["b", 0]) == answer(job)
    assert_empty(built)


def commit(built: Engine, sequence: Sequence, outcomes: list[Sampled]) -> None:
    """Commit a step that drew ``outcomes``, each after the one before it was drafted rightly."""
    tree = DraftTree.chain([o.token for o in outcomes[:-1]], [0.5] * (len(outcomes) - 1))
    head = Head(sequence, 0, tree)
    for outcome in outcomes:
        if not head.take(outcome):
            break
    built.commit(head, 101.0)


def test_several_tokens_commit_at_once_and_stop_at_the_first_end() -> None:
    built = engine()
    built.add(request("a", [1, 2, 3], max_tokens=6, ignore_eos=True, stop_token_ids=[9]))
    built.step()
    sequence = next(iter(built._running.values()))
    slots = built.space.reserve(2)  # as a verified draft leaves it: K and V of all but the last token are there
    sequence.hold(slots)
    sequence.context += 2
    commit(built, sequence, [Sampled(4), Sampled(9), Sampled(5)])
    (delta,) = built.step()
    assert delta.tokens == [4, 9]
    assert (delta.reason, delta.stop_token) == ("stop", 9)


def test_tokens_before_a_failed_one_are_delivered() -> None:
    built = engine()
    built.add(request("a", [1, 2, 3], max_tokens=6, ignore_eos=True))
    built.step()
    sequence = next(iter(built._running.values()))
    sequence.hold(built.space.reserve(1))
    sequence.context += 1
    commit(built, sequence, [Sampled(4), Sampled(-1, error=HeadraceError("bad logits"))])
    deltas = run(built)["a", 0]
    assert [(d.tokens, d.reason) for d in deltas] == [([4], None), ([], "error")]
    assert_empty(built)


def test_a_prompt_whose_logits_are_bad_is_not_left_to_be_found() -> None:
    built = engine()
    sample = built.sampler.sample
    built.sampler.sample = lambda result, rows: [Sampled(-1, error=HeadraceError("bad logits")) for _ in rows]
    built.add(request("a", [1] * 10, n=2))
    assert [d.reason for deltas in run(built).values() for d in deltas] == ["error", "error"]
    assert built.stats().slots_cached == 0
    built.sampler.sample = sample
    built.add(request("b", [1] * 10))
    assert run(built)["b", 0][-1].timing.cached_tokens == 0


def test_an_interrupt_in_the_forward_leaks_no_slot() -> None:
    built = engine()
    built.add(request("a", [1] * 40, max_tokens=5, ignore_eos=True))
    built.step()
    inner = built.runner.run

    def interrupted(batch: object) -> None:
        raise KeyboardInterrupt

    built.runner.run = interrupted
    with pytest.raises(KeyboardInterrupt):
        built.step()
    built.runner.run = inner
    built.close()
    run(built)
    assert_empty(built)


def test_a_sequence_cancelled_before_its_birth_ends_alone() -> None:
    built = engine(max_step_tokens=8)
    job = request("a", [1] * 20, n=3, max_tokens=4, ignore_eos=True)
    built.add(job)
    built.step()
    built.cancel("a", 0)
    built.cancel("a", 2)
    out = run(built)
    assert {index: deltas[-1].reason for (_, index), deltas in out.items()} == {0: "abort", 1: "length", 2: "abort"}
    assert tokens(out["a", 1]) == answer(job, 1)
    assert_empty(built)


@pytest.mark.parametrize(
    ("bad", "field", "error"),
    [
        ({"prompt": ()}, "prompt", InvalidRequest),
        ({"prompt": (1, 97)}, "prompt", InvalidRequest),
        ({"prompt": (-1,)}, "prompt", InvalidRequest),
        ({"prompt": (1,) * 200}, "prompt", ContextTooLong),
        ({"prompt": (1,) * 190, "params": SamplingParams(max_tokens=11)}, "max_tokens", ContextTooLong),
        ({"prompt": (1,), "params": SamplingParams(n=9)}, "n", InvalidRequest),
        ({"prompt": (1,), "params": SamplingParams(logit_bias={97: 1.0})}, "logit_bias", InvalidRequest),
        ({"prompt": (1,), "params": SamplingParams(stop_token_ids=[500])}, "stop_token_ids", InvalidRequest),
    ],
)
def test_impossible_requests_are_refused_by_name(bad, field, error) -> None:
    built = engine()
    with pytest.raises(error) as caught:
        built.add(Request("x", **bad))
    assert caught.value.field == field
    assert not built.busy


def test_open_ids_are_unique() -> None:
    built = engine()
    built.add(request("a", [1]))
    with pytest.raises(InvalidRequest, match="already open"):
        built.add(request("a", [1]))


def test_timing_counts_from_arrival_and_skips_the_first_token() -> None:
    built = engine()
    built.add(request("a", [1] * 40, max_tokens=5, ignore_eos=True))  # two prefill steps of 32 rows, 10 ms each
    timing = run(built)["a", 0][-1].timing
    assert timing.ttft_ms == pytest.approx(20.0)
    assert timing.tpot_ms == pytest.approx(10.0)
