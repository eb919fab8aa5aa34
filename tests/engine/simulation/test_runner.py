"""The simulated engine: exact times on machines of straight lines, and stretches equal to single steps."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.core.batch import StepShape
from headrace.core.clock import VirtualClock
from headrace.core.outputs import RequestTiming
from headrace.core.policy import Limits
from headrace.core.request import Request, SamplingParams
from headrace.engine.policies import POLICIES, get_policy
from headrace.engine.sampling.rng import stream_key
from headrace.engine.simulation.runner import VOCAB, SimulatedEngine


class Machine:
    """10 ms a step, 1 ms a row and a thousandth of a millisecond for every context token."""

    def cost(self, shape: StepShape) -> float:
        return 10.0 + shape.prefill_tokens + shape.decode_tokens + 1e-3 * shape.context


def request(name: str, prompt: int, output: int, arrival: float = 1.0, **fields: object) -> Request:
    tokens = tuple(random.Random(name).choices(range(VOCAB), k=prompt))
    params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True, seed=7)
    return Request(name, tokens, params, arrival=arrival, **fields)  # type: ignore[arg-type]


def run(engine: SimulatedEngine, clock: VirtualClock, requests: list[Request]) -> dict[str, RequestTiming]:
    """Replay by hand: submit what is due, step, and let time pass while idle."""
    coming = sorted(requests, key=lambda r: r.arrival)
    timings: dict[str, RequestTiming] = {}
    while coming or engine.busy:
        while coming and coming[0].arrival <= clock.now():
            engine.add(coming.pop(0))
        engine.quiet_until = coming[0].arrival if coming else float("inf")
        if not engine.busy:
            clock.advance(coming[0].arrival - clock.now())
            continue
        for delta in engine.step():
            if delta.reason is not None:
                assert delta.reason == "length"
                assert delta.timing is not None
                timings[delta.request_id] = delta.timing
    return timings


def engine(clock: VirtualClock, policy: str = "chunked", **options: object) -> SimulatedEngine:
    limits = Limits(max_sequences=4, max_step_tokens=32, max_prefill_tokens=64)
    return SimulatedEngine(Machine(), get_policy(policy), clock, **{"limits": limits, "slots": 600} | options)  # type: ignore[arg-type]


@pytest.mark.parametrize("stretch", [True, False])
def test_times_of_a_lone_request_are_exact(stretch: bool) -> None:
    clock = VirtualClock(1.0)
    timing = run(engine(clock, stretch=stretch), clock, [request("a", prompt=80, output=5)])["a"]
    # Chunks of 32, 32 and 16 over contexts of 0, 32 and 64; then single rows over 80, 81, 82 and 83.
    first = (10 + 32) + (10 + 32 + 0.032) + (10 + 16 + 0.064)
    assert timing.ttft_ms == pytest.approx(first, abs=1e-9)
    assert timing.tpot_ms == pytest.approx((4 * 11 + 0.080 + 0.081 + 0.082 + 0.083) / 4, abs=1e-9)
    assert timing.decoded == 5


def test_times_of_two_requests_are_exact() -> None:
    clock = VirtualClock(1.0)
    timings = run(engine(clock), clock, [request("a", 10, 4), request("b", 10, 4, arrival=1.025)])
    # a: prompt (20 ms), a token (11.010), b arrives meanwhile: b's prompt beside a's token (10 + 11 + .011), both (12.022).
    assert timings["a"].ttft_ms == pytest.approx(20.0)
    assert timings["a"].tpot_ms == pytest.approx((11.010 + 21.011 + 12.022) / 3)
    assert timings["b"].ttft_ms == pytest.approx(20 + 11.010 + 21.011 - 25)
    assert timings["b"].tpot_ms == pytest.approx((12.022 + 11.011 + 11.012) / 3)


workloads = st.lists(
    st.tuples(st.integers(1, 90), st.integers(1, 40), st.integers(0, 1500), st.integers(0, 2), st.sampled_from("ab")),
    min_size=1,
    max_size=12,
)


@pytest.mark.parametrize("policy", sorted(POLICIES))
@settings(max_examples=30, deadline=None)
@given(work=workloads, slots=st.integers(140, 600), prefix_cache=st.booleans())
def test_stretches_change_nothing(
    policy: str, work: list[tuple[int, int, int, int, str]], slots: int, prefix_cache: bool
) -> None:
    requests = [
        request(str(i), prompt, output, 1.0 + ms / 1e3, priority=priority, owner=owner)
        for i, (prompt, output, ms, priority, owner) in enumerate(work)
    ]
    outcomes = []
    for stretch in (True, False):
        clock = VirtualClock(1.0)
        made = engine(clock, policy, slots=slots, prefix_cache=prefix_cache, stretch=stretch)
        timings = run(made, clock, requests)
        stats = made.stats()
        outcomes.append(
            (timings, clock.now(), stats.steps, stats.decode_tokens, stats.preemptions, made.space.available)
        )
        assert {name: t.decoded for name, t in timings.items()} == {r.id: r.params.max_tokens for r in requests}
        assert made.space.available == slots, "every slot is free or evictable again"
    assert outcomes[0] == outcomes[1]


def test_stretches_are_taken() -> None:
    clock = VirtualClock(1.0)
    made = engine(clock)
    made.add(request("a", 10, 100))
    calls = 0
    while made.busy:
        made.step()
        calls += 1
    assert calls == 2, "the prompt, then everything else"
    assert made.stats().steps == 100


def test_stop_tokens_never_come() -> None:
    clock = VirtualClock(1.0)
    for stretch in (True, False):
        made = engine(clock, stretch=stretch)
        own = stream_key(7) % VOCAB
        params = SamplingParams(temperature=0.0, max_tokens=9, seed=7, stop_token_ids=(own, (own + 1) % VOCAB))
        made.add(Request("a", (1, 2, 3), params))
        tokens = []
        while made.busy:
            for delta in made.step():
                tokens += delta.tokens
        assert tokens == [(own + 2) % VOCAB] * 9
