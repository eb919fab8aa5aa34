"""Ranks as processes: they answer together, end together, and leave nobody behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from tests import tiny

from headrace import LLM, SamplingParams
from headrace.compose import build_service
from headrace.core.config import EngineConfig
from headrace.core.errors import EngineUnavailable, InvalidRequest
from headrace.core.request import Request

PATIENCE_S = 120.0
PROMPTS = [{"prompt_token_ids": list(range(5, 30))}, {"prompt_token_ids": [9]}]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
SMALL = {"kv_gib": 0.01, "threads": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint("llama", tmp_path_factory.mktemp("llama"))


def others(pid: int | None = None) -> list[psutil.Process]:
    """The ranks that a process has started."""
    children = psutil.Process(pid).children()
    return [child for child in children if any("follower" in word for word in child.cmdline())]


def gone(processes: list[psutil.Process]) -> bool:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes):
            return True
        time.sleep(0.05)
    return False


def tokens(llm: LLM) -> list[list[int]]:
    return [list(answer.outputs[0].token_ids) for answer in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]


def test_an_llm_of_two_ranks_answers_as_one_and_survives_none(folder: Path) -> None:
    """Packed linears where there is a compiler: each rank packs its own part."""
    with LLM(str(folder), **SMALL) as llm:
        expected = tokens(llm)
    with LLM(str(folder), tensor_parallel_size=2, **SMALL) as llm:
        ranks = others()
        assert len(ranks) == 1
        assert tokens(llm) == expected
        ranks[0].kill()
        with pytest.raises(EngineUnavailable, match=r"rank 1 of 2 \(process \d+\) ended with exit code -9"):
            tokens(llm)
        with pytest.raises(EngineUnavailable, match="load the model again"):
            tokens(llm)
    assert not torch.distributed.is_initialized()
    with LLM(str(folder), tp=2, linears="module", **SMALL) as llm:
        assert tokens(llm) == expected
        ranks = others()
    assert gone(ranks)


def test_ranks_end_when_rank_0_is_killed(folder: Path) -> None:
    script = Path(__file__).with_name("ruined.py")
    with subprocess.Popen([sys.executable, str(script), str(folder)], stdout=subprocess.PIPE, text=True) as program:
        try:
            assert program.stdout is not None
            line = next(line for line in program.stdout if line.startswith("ranks"))
            ranks = [psutil.Process(int(pid)) for pid in line.split()[1:]]
            assert len(ranks) == 1
        finally:
            program.kill()
    assert gone(ranks)


def test_the_service_starts_again_after_a_rank_died(folder: Path) -> None:
    asyncio.run(lose_a_rank(folder))


async def lose_a_rank(folder: Path) -> None:
    service = build_service(EngineConfig(model=str(folder), tp=2, linears="module", profile="off", **SMALL))  # type: ignore[arg-type]
    await service.start()
    try:
        await service.ready(PATIENCE_S)
        first, expected = service.pid, await answer(service)
        (rank,) = others(first)
        os.kill(rank.pid, signal.SIGKILL)
        deadline = time.monotonic() + PATIENCE_S
        while service.pid == first and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        await service.ready(PATIENCE_S)
        assert await answer(service) == expected
        ranks = others(service.pid)
    finally:
        await service.close()
    assert len(ranks) == 1
    assert gone(ranks)


async def answer(service: object) -> list[int]:
    request = Request("one", tuple(range(5, 30)), GREEDY)
    return [token async for delta in service.submit(request) for token in delta.tokens]  # type: ignore[attr-defined]


def test_what_cannot_be_shared_starts_and_leaves_nothing(folder: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"tp is 3, but .* has 4 attention heads: choose 1 or 2"):
        LLM(str(folder), tp=3, **SMALL)
    assert not others()
    assert not torch.distributed.is_initialized()
    with pytest.raises(InvalidRequest, match="tp is 0: give at least 1"):
        LLM(str(folder), tp=0)
