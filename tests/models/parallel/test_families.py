"""Two ranks answer what one process answers, family by family: greedy and seeded, with chunks, company and preemption."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny
from tests.models.packing import Fed, feed, ints, truth

from headrace.core.policy import Limits
from headrace.core.request import Request, SamplingParams
from headrace.engine.engine import Engine
from headrace.engine.kv import KVSpace
from headrace.engine.policies import get_policy
from headrace.engine.sampling.sampler import TorchSampler
from headrace.models.cache.slots import SlotPool
from headrace.models.fused.linear import choose_linears
from headrace.models.load import load
from headrace.models.parallel.group import Group, join, leave
from headrace.models.parallel.ranks import Setup
from headrace.models.parallel.room import shared_slots
from headrace.models.parallel.runner import ParallelRunner
from headrace.models.runner import ModelRunner

FAMILIES = [
    "llama",
    "llama3_rope",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3",
    "phi3",
    "olmo2",
    "granite",
    "qwen3_moe",
    "mixtral",
]
CONTROL = "llama without its sums"
QUANTISED = {"llama rounded to int8": "int8", "llama rounded to nf4": "nf4"}
KV_GIB = 0.002
NEW = 20
PROMPTS = [[7], list(range(5, 45)), list(range(60, 77)), list(range(100, 170))]
GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True)
SEEDED = SamplingParams(temperature=1.0, top_p=0.95, seed=3, max_tokens=NEW, ignore_eos=True)
CPU = torch.device("cpu")


class OneRank:
    """What :class:`ParallelRunner` needs of the other ranks, for a single one that outlives it."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe, self.size = pipe, 2

    def hear(self, word: str) -> None:
        assert self.pipe.recv() == (word, None)

    def tell(self, message: memoryview) -> None:
        self.pipe.send_bytes(message)

    def check(self) -> None:
        """It is there."""

    def close(self) -> None:
        self.pipe.close()


class Pair:
    """This process as rank 0 and one other, which serves a model per pipe, in the order of ``models``."""

    def __init__(self, folder: Path, models: list[str]) -> None:
        ends = {name: Pipe() for name in models}
        self.pipes = {name: near for name, (near, _) in ends.items()}
        far = [end.fileno() for _, end in ends.values()]
        script = Path(__file__).with_name("peer.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script), *map(str, far)],
            pass_fds=far,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for _, end in ends.values():
            end.close()
        self.folder = folder
        self.joined = False

    def runner(self, name: str) -> tuple[Any, SlotPool]:
        """The runner of both ranks over the checkpoint ``name``, and its pool."""
        path = tiny.checkpoint(name.split()[0], self.folder / name.replace(" ", "-"))
        options = {"name": str(path), "dtype": "float32"}
        linears, quantize = ("auto", QUANTISED[name]) if name in QUANTISED else ("module", None)
        room = {"kv_gib": KV_GIB, "max_context": None}
        pipe = self.pipes[name]
        pipe.send(
            Setup(
                rank=1,
                size=2,
                store=self.folder / "ranks",
                device="cpu",
                threads=1,
                load=options,
                linears=linears,
                quantize=quantize,
                slots=room,
                runner={"attention": "reference"},
            )
        )
        group = Group(0, 2)
        if not self.joined:
            join(group, self.folder / "ranks", CPU)
            self.joined = True
        model = load(**options, device="cpu", group=group, progress=False)
        choose_linears(model, linears, quantize)
        pool = SlotPool(shared_slots(model, group, KV_GIB, None))
        return ParallelRunner(ModelRunner(model, pool, attention="reference"), OneRank(pipe)), pool  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    made = Pair(tmp_path_factory.mktemp("ranks"), [*FAMILIES, CONTROL, *QUANTISED])
    yield made
    for pipe in made.pipes.values():
        pipe.close()
    made.process.wait(60)
    leave()


def answers(runner: Any, pool: SlotPool) -> list[list[int]]:
    card = replace(tiny.loaded("llama").card, context=tiny.CONTEXT)
    limits = Limits(max_sequences=8, max_step_tokens=33)
    engine = Engine(runner, KVSpace(pool), get_policy("chunked"), TorchSampler(), card, limits=limits)
    out: dict[str, list[int]] = {}
    for kind, params in (("greedy", GREEDY), ("seeded", SEEDED)):
        for i, prompt in enumerate(PROMPTS):
            engine.add(Request(f"{kind} {i}", tuple(prompt), params))
    while engine.busy:
        for delta in engine.step():
            out.setdefault(delta.request_id, []).extend(delta.tokens)
    return [out[name] for name in sorted(out)]


def alone(family: str) -> list[list[int]]:
    """The same by one process."""
    pool = SlotPool(700)
    return answers(ModelRunner(tiny.loaded(family), pool, "reference"), pool)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_answer_as_one(pair: Pair, family: str) -> None:
    runner, pool = pair.runner(family)
    try:
        assert answers(runner, pool) == alone(family)
        whole = tiny.config(family)
        heads = pool.plane("k.0").shape[1]
        assert heads == whole.num_key_value_heads // (1 if family in ("phi3", "olmo2") else 2)
    finally:
        runner.close()


def test_without_the_sums_the_answers_differ(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: rank 0 goes on with its own part of each sum."""

    def only_own(self: Group, x: torch.Tensor) -> torch.Tensor:
        own = x.clone()
        torch.distributed.all_reduce(x)
        return own

    monkeypatch.setattr(Group, "sum_", only_own)
    runner, pool = pair.runner(CONTROL)
    try:
        assert answers(runner, pool) != alone("llama")
    finally:
        runner.close()


@pytest.mark.parametrize("name", QUANTISED)
def test_ranks_that_round_their_shares_are_as_exact_as_one_process(pair: Pair, name: str) -> None:
    """Not the same bits: a share of a row has scales of its own. But no further from what the weights say."""
    runner, _ = pair.runner(name)
    single = load(str(tiny.checkpoint("llama", pair.folder / "whole")), dtype="float32", device="cpu", progress=False)
    exact = truth(single.module, ints(PROMPTS[3]))
    choose_linears(single, "auto", QUANTISED[name])
    try:
        errors = [distance(run, exact) for run in (runner, ModelRunner(single, SlotPool(700), "reference"))]
    finally:
        runner.close()
    assert 0 < errors[1] < 0.5
    assert 0 < errors[0] < 1.5 * errors[1]


def distance(runner: Any, exact: torch.Tensor) -> float:
    """How far the logits of the longest prompt, in two chunks, are from ``exact``, in units of their spread."""
    sequence = Fed(ints(PROMPTS[3]), ints(range(len(PROMPTS[3]))))
    for count in (30, 40):
        feed(runner, [sequence], [count])
    return float((torch.cat(sequence.logits) - exact).std() / exact.std())
