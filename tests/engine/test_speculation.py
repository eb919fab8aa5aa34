"""Speculation in the step loop: whatever is drafted, the text is the same, and every slot is accounted for."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.fake import EOS, VOCAB, HashSampler, answer, engine, next_token, request
from tests.engine.test_engine import assert_empty, run, tokens

from headrace.core.batch import StepShape
from headrace.core.policy import StepPlan, View
from headrace.core.request import SLO, Request, SamplingParams
from headrace.core.speculation import ROOT, DraftJob, DraftOrder, DraftPlan, DraftTree
from headrace.engine.drafting import Drafting
from headrace.engine.engine import Engine
from headrace.engine.policies.chunked import Chunked
from headrace.engine.sampling.sampler import Sampled
from headrace.speculation.calibration import OnlineCalibration
from headrace.speculation.policies import POLICIES


class Line:
    """10 ms a step and 0.1 ms a row; a draft layer takes 1 ms."""

    def cost(self, shape: StepShape) -> float:
        return 10.0 + 0.1 * (shape.prefill_tokens + shape.decode_tokens)

    def draft_ms(self, source: str, sequences: int, depth: int, width: int) -> float:
        return 1.0 * depth

    def observe(self, source: str, sequences: int, depth: int, width: int, ms: float) -> None:
        pass


class Prophet:
    """Drafts trees that are right as often as ``skill`` says, with repeated children and children of wrong nodes."""

    name = "prophet"
    free = False

    def __init__(self, skill: float, seed: int = 0) -> None:
        self.engine: Engine | None = None
        self._skill, self._random = skill, random.Random(seed)
        self.forgotten: list[int] = []

    def draft(self, jobs: Sequence[DraftJob]) -> list[DraftTree]:
        return [self._tree(job) for job in jobs]

    def _tree(self, job: DraftJob) -> DraftTree:
        assert self.engine is not None
        key = self.engine._running[job.sequence].draw_key
        texts: list[list[int]] = []
        ids: list[int] = []
        parents: list[int] = []
        layer: list[tuple[int, list[int]]] = [(ROOT, job.tokens.tolist())]
        for _ in range(job.depth):
            grown = []
            for above, text in layer:
                for _ in range(job.width if above == ROOT else 1):
                    right = self._random.random() < self._skill
                    token = next_token(text, key) if right else self._random.randrange(VOCAB)
                    parents.append(above)
                    ids.append(token)
                    texts.append([*text, token])
                    grown.append((len(ids) - 1, texts[-1]))
            layer = grown
        return DraftTree.of(ids, parents, [1.0 / (job.width + self._random.random())] * len(ids), self.name)

    def forget(self, sequence: int) -> None:
        self.forgotten.append(sequence)


class Anything(Chunked):
    """Chunked prefill, with random connected parts of random drafts."""

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)

    def draft(self, view: View) -> DraftPlan:
        depths = [(s.id, self._random.randint(0, 6), self._random.randint(1, 3)) for s in view.running]
        return DraftPlan([DraftOrder(number, "prophet", depth, width) for number, depth, width in depths])

    def plan(self, view: View) -> StepPlan:
        plan = super().plan(view)
        for number, tree in view.candidates.items():
            nodes: list[int] = []
            for node, parent in enumerate(tree.parents.tolist()):
                if (parent == ROOT or parent in nodes) and self._random.random() < 0.8:
                    nodes.append(node)
            plan.nodes[number] = np.array(nodes, np.int32)
        return plan


def speculating(skill: float = 0.7, policy: object = None, **options: object) -> Engine:
    prophet = Prophet(skill)
    drafting = Drafting([prophet], OnlineCalibration(), Line())
    built = engine(policy=policy or Anything(), drafting=drafting, profile=Line(), **options)  # type: ignore[arg-type]
    prophet.engine = built
    return built


jobs = st.lists(
    st.tuples(
        st.lists(st.integers(1, 5), min_size=1, max_size=30),
        st.integers(1, 25),
        st.integers(1, 3),
        st.sampled_from([None, 5.0, 40.0]),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=100, deadline=None)
@given(
    jobs=jobs,
    policy=st.sampled_from(["anything", *POLICIES]),
    skill=st.sampled_from([0.0, 0.6, 1.0]),
    prefix_cache=st.booleans(),
    slots=st.sampled_from([70, 90, 150, 400]),
    budget=st.sampled_from([8, 17, 64]),
    cancels=st.sets(st.integers(0, 7), max_size=2),
)
def test_answers_do_not_depend_on_drafts(jobs, policy, skill, prefix_cache, slots, budget, cancels) -> None:
    """Any policy, any drafts (all wrong, all right, repeated), shortage, preemption, n and cancel: the same tokens."""
    chosen = Anything() if policy == "anything" else POLICIES[policy]()
    built = speculating(skill, chosen, slots=slots, prefix_cache=prefix_cache, max_step_tokens=budget)
    requests = [
        Request(f"r{i}", tuple(p), SamplingParams(n=n, max_tokens=m, seed=i), slo=SLO(tpot_ms=tpot))
        for i, (p, m, n, tpot) in enumerate(jobs)
    ]
    out = defaultdict(list)
    for i, job in enumerate(requests):
        built.add(job)
        for delta in built.step():
            out[delta.request_id, delta.index].append(delta)
        if i in cancels:
            built.cancel(f"r{i}")
    for key, deltas in run(built).items():
        out[key] += deltas
    for i, job in enumerate(requests):
        for index in range(job.params.n):
            deltas = out[job.id, index]
            got, expected = tokens(deltas), answer(job, index)
            if deltas[-1].reason == "abort":
                assert i in cancels
                assert got == expected[: len(got)]
            else:
                assert got == expected
                assert deltas[-1].reason == ("stop" if expected[-1] == EOS else "length")
    assert_empty(built)


def test_right_drafts_save_steps_and_wrong_ones_cost_none() -> None:
    job = request("a", [1, 2, 3], max_tokens=40, ignore_eos=True)
    steps = {}
    for skill in (0.0, 1.0):
        built = speculating(skill, POLICIES["spec-4"]())
        built.add(job)
        assert tokens(run(built)["a", 0]) == answer(job)
        steps[skill] = built.stats().steps
    assert steps[0.0] == 40
    assert steps[1.0] <= 1 + 39 // 5 + 1


def test_several_tokens_of_a_step_come_in_one_delta() -> None:
    built = speculating(1.0, POLICIES["spec-4"]())
    built.add(request("a", [1, 2, 3], max_tokens=12, ignore_eos=True))
    assert [len(d.tokens) for d in run(built)["a", 0]] == [1, 5, 5, 1]


def test_the_end_of_an_answer_cuts_a_verified_draft() -> None:
    """A stop token in the middle of an accepted path: nothing after it is told, and its slots are free again."""
    job = request("a", [1, 2, 3], max_tokens=40, ignore_eos=True)
    whole = answer(job)
    stop = whole[7]
    built = speculating(1.0, POLICIES["spec-8"]())
    built.add(request("a", [1, 2, 3], max_tokens=40, ignore_eos=True, stop_token_ids=[stop]))
    deltas = run(built)["a", 0]
    assert tokens(deltas) == whole[: whole.index(stop) + 1]
    assert (deltas[-1].reason, deltas[-1].stop_token) == ("stop", stop)
    assert deltas[-1].timing.decoded == whole.index(stop) + 1
    assert_empty(built)


def test_an_error_in_the_middle_of_a_path_delivers_what_came_before() -> None:
    built = speculating(1.0, POLICIES["spec-4"]())
    built.add(request("a", [1, 2, 3], max_tokens=12, ignore_eos=True))
    built.step()
    calls = 0
    real = HashSampler.sample

    def failing(result, rows):
        nonlocal calls
        calls += 1
        from headrace.core.errors import HeadraceError

        return [Sampled(-1, error=HeadraceError("bad"))] if calls == 3 else real(built.sampler, result, rows)

    built.sampler.sample = failing
    deltas = run(built)["a", 0]
    assert [(len(d.tokens), d.reason) for d in deltas] == [(2, None), (0, "error")]
    assert_empty(built)


def test_drafts_preempt_nobody() -> None:
    """With room for everybody's own tokens and no more, trees shrink to nothing and all stay."""
    jobs = [request(f"r{i}", [i + 1] * 10, max_tokens=10, ignore_eos=True) for i in range(4)]
    built = speculating(1.0, POLICIES["spec-8"](), slots=84, prefix_cache=False)
    for job in jobs:
        built.add(job)
    out = run(built)
    assert built.stats().preemptions == 0
    for job in jobs:
        assert tokens(out[job.id, 0]) == answer(job)


def test_a_request_may_forbid_drafts() -> None:
    built = speculating(1.0, POLICIES["adaserve"]())
    built.add(Request("a", (1, 2, 3), SamplingParams(max_tokens=20, ignore_eos=True, seed=7), speculate=False))
    run(built)
    assert built.stats().drafted == 0
    assert built.stats().steps == 20


def test_drafters_are_told_who_has_ended() -> None:
    prophet = Prophet(1.0)
    built = engine(policy=Anything(), drafting=Drafting([prophet], OnlineCalibration(), Line()))
    prophet.engine = built
    built.add(request("a", [1, 2, 3], n=2, max_tokens=5))
    run(built)
    assert sorted(prophet.forgotten) == [1, 2]


def test_reading_a_prompt_is_no_cost_of_drafting() -> None:
    """The first draft of a text, for which the drafter reads all of it, teaches nothing about what drafts cost; later ones do."""
    seen: list[int] = []

    class Noting(Line):
        def observe(self, source: str, sequences: int, depth: int, width: int, ms: float) -> None:
            seen.append(sequences)

    prophet = Prophet(0.0)
    built = engine(policy=POLICIES["spec-4"](), drafting=Drafting([prophet], OnlineCalibration(), Noting()))
    prophet.engine = built
    built.add(request("a", [1] * 30, max_tokens=8, ignore_eos=True))
    built.step()  # the prompt
    built.step()
    assert (built.stats().drafted, seen) == (4, [])
    built.step()
    assert (built.stats().drafted, seen) == (8, [1])


@pytest.mark.parametrize("fault", ["slots", "token"])
def test_a_wrong_commit_is_noticed(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """Negative control: keeping the wrong slots, or trusting the draft's token, changes the text."""
    import headrace.engine.engine as module
    from headrace.engine.verify import Walk, settled

    if fault == "slots":
        monkeypatch.setattr(module, "settled", lambda slots, path: settled(slots, path[::-1]))
    else:
        monkeypatch.setattr(Walk, "step", lambda self, token: bool(self._children) and not self.path.append(0))
    built = speculating(1.0 if fault == "slots" else 0.5, POLICIES["spec-4"]())
    job = request("a", [1, 2, 3], max_tokens=24, ignore_eos=True)
    built.add(job)
    try:
        got = tokens(run(built, 60)["a", 0])
    except (AssertionError, IndexError, ValueError):
        return
    assert got != answer(job)
