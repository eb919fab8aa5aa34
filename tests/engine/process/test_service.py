"""The engine in its own process: streams, cancels, crashes and restarts, over the fake model."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import MappingProxyType

import psutil
import pytest
from tests.engine.fake import answer, engine, request

from headrace.core.clock import WallClock
from headrace.core.errors import EngineUnavailable, HeadraceError, InvalidRequest, ModelNotFound, Overloaded
from headrace.core.outputs import SequenceDelta
from headrace.core.protocols import StepResult
from headrace.core.request import Request, SamplingParams
from headrace.engine.engine import Engine
from headrace.engine.process.link import Link
from headrace.engine.process.service import ProcessService
from headrace.engine.process.worker import run_worker


def slow_engine(delay_s: float) -> Engine:
    """The fake engine on the wall clock, whose steps take ``delay_s`` and die on three 96 in a row."""
    built = engine(2000, max_sequences=64, max_step_tokens=128)
    built.clock = WallClock()
    built.card = replace(built.card, context=1000)
    inner = built.runner.run

    def run(batch: object) -> StepResult:
        if batch.ids[:3].tolist() == [96, 96, 96]:  # type: ignore[attr-defined]
            os._exit(3)
        time.sleep(delay_s)
        return inner(batch)  # type: ignore[arg-type]

    built.runner.run = run
    return built


def serve(connection: Connection, delay_s: float = 0.001) -> None:
    run_worker(connection, partial(slow_engine, delay_s))


def refuse(connection: Connection) -> None:
    def build() -> Engine:
        raise ModelNotFound("no model 'nowhere': give a folder", field="model")

    run_worker(connection, build)


def crash_at_once(connection: Connection) -> None:
    os._exit(7)


def load_for_ever(connection: Connection) -> None:
    time.sleep(600)


def crash_after_a_while(connection: Connection) -> None:
    time.sleep(0.3)
    os._exit(7)


async def collect(service: ProcessService, job: Request) -> dict[int, list[SequenceDelta]]:
    out: dict[int, list[SequenceDelta]] = {}
    async for delta in service.submit(job):
        out.setdefault(delta.index, []).append(delta)
    return out


def run(body, target=serve, arguments=(), **options) -> None:
    """Run ``body(service)`` against a started service and close it afterwards."""

    async def main() -> None:
        service = ProcessService(target, arguments, **options)
        await service.start()
        try:
            await asyncio.wait_for(body(service), 60)
        finally:
            await service.close()

    asyncio.run(main())


def test_many_streams_answer_as_if_alone() -> None:
    async def body(service: ProcessService) -> None:
        await service.ready(30)
        jobs = [request(f"r{i}", [i % 9 + 1] * (i + 1), max_tokens=20, n=i % 3 + 1) for i in range(30)]
        for job, out in zip(jobs, await asyncio.gather(*(collect(service, j) for j in jobs)), strict=True):
            for index in range(job.params.n):
                assert [t for d in out[index] for t in d.tokens] == answer(job, index)
                assert out[index][-1].timing.ttft_ms > 0
        stats = await service.stats()
        assert stats.slots_free + stats.slots_cached == stats.slots_total
        assert (stats.running, stats.waiting) == (0, 0)

    run(body)


def test_a_slow_reader_gets_merged_deltas() -> None:
    async def body(service: ProcessService) -> None:
        await service.ready(30)
        job = request("a", [1, 2], max_tokens=60, ignore_eos=True)
        stream = service.submit(job)
        await asyncio.sleep(0.5)
        deltas = [d async for d in stream]
        assert len(deltas) == 1
        assert deltas[0].tokens == answer(job)
        assert deltas[0].reason == "length"

    run(body)


def test_closing_a_stream_cancels_and_frees() -> None:
    async def body(service: ProcessService) -> None:
        await service.ready(30)
        stream = service.submit(request("a", [1, 2], max_tokens=900, ignore_eos=True))
        await anext(stream)
        await stream.aclose()
        await asyncio.sleep(0.1)
        stats = await service.stats()
        assert stats.running == 0
        assert stats.aborted == 1
        assert stats.slots_free + stats.slots_cached == stats.slots_total

    run(body)


def test_a_full_queue_is_refused_with_a_time_to_come_back() -> None:
    async def body(service: ProcessService) -> None:
        await service.ready(30)
        streams = [service.submit(request(f"r{i}", [1], max_tokens=500, ignore_eos=True)) for i in range(66)]
        with pytest.raises(Overloaded) as caught:
            service.submit(request("late", [1]))
        assert caught.value.retry_after_s >= 1
        for stream in streams:
            await stream.aclose()
        assert await collect(service, request("again", [1], max_tokens=2))

    run(body, max_queue=2)


def test_a_killed_engine_ends_open_requests_with_an_error_and_restarts() -> None:
    async def body(service: ProcessService) -> None:
        await service.ready(30)
        jobs = [request(f"r{i}", [1, 2, i], max_tokens=900, ignore_eos=True) for i in range(5)]
        tasks = [asyncio.create_task(collect(service, j)) for j in jobs]
        await asyncio.sleep(0.2)
        first = service.pid
        os.kill(first, signal.SIGKILL)
        for out in await asyncio.gather(*tasks):
            last = out[0][-1]
            assert last.reason == "error"
            assert isinstance(last.error, EngineUnavailable)
            assert last.error.code == "engine_crashed"
        assert service.state == "loading"
        with pytest.raises(EngineUnavailable):
            service.submit(jobs[0])
        await service.ready(30)
        assert service.pid != first
        job = request("after", [4, 2], max_tokens=5)
        out = await collect(service, job)
        assert [t for d in out[0] for t in d.tokens] == answer(job)

    run(body)


def test_a_request_that_crashes_the_engine_is_not_sent_again() -> None:
    async def body(service: ProcessService) -> None:
        await service.ready(30)
        out = await collect(service, request("poison", [96, 96, 96], max_tokens=5))
        assert out[0][-1].reason == "error"
        await service.ready(30)
        assert (await collect(service, request("fine", [5], max_tokens=2)))[0][-1].reason in ("length", "stop")

    run(body)


def test_an_id_may_come_back_while_the_engine_still_speaks_of_its_last_bearer() -> None:
    async def body(service: ProcessService) -> None:
        await service.ready(30)
        for _ in range(5):
            stream = service.submit(request("a", [1, 2], max_tokens=500, ignore_eos=True))
            await anext(stream)
            await stream.aclose()
            job = request("a", [3, 4], max_tokens=20, ignore_eos=True)
            deltas = (await collect(service, job))[0]
            assert {d.request_id for d in deltas} == {"a"}
            assert [t for d in deltas for t in d.tokens] == answer(job)
        first = service.submit(request("a", [1], max_tokens=500, ignore_eos=True))
        with pytest.raises(InvalidRequest, match="already open"):
            service.submit(request("a", [1]))
        await first.aclose()

    run(body)


def test_a_request_that_cannot_be_pickled_fails_alone() -> None:
    async def body(service: ProcessService) -> None:
        await service.ready(30)
        bias = MappingProxyType({1: 1.0})
        out = await collect(service, Request("a", (1,), SamplingParams(n=2, logit_bias=bias)))
        assert [(d[-1].reason, type(d[-1].error)) for d in out.values()] == [("error", InvalidRequest)] * 2
        job = request("b", [5], max_tokens=2)
        assert [t for d in (await collect(service, job))[0] for t in d.tokens] == answer(job)

    run(body)


def test_restarts_leave_no_thread_and_no_open_file_behind() -> None:
    async def body(service: ProcessService) -> None:
        await service.ready(30)
        gc.collect()
        files = psutil.Process().num_fds()
        for _ in range(2):
            os.kill(service.pid, signal.SIGKILL)
            while service.state == "ready":
                await asyncio.sleep(0.01)
            await service.ready(30)
        names = sorted(t.name for t in threading.enumerate() if t.name.startswith("headrace-engine"))
        assert names == ["headrace-engine-read", "headrace-engine-write"]
        gc.collect()
        assert psutil.Process().num_fds() <= files

    run(body)


def test_stats_asked_of_an_engine_that_dies_come_at_once() -> None:
    async def body(service: ProcessService) -> None:
        await service.ready(30)
        os.kill(service.pid, signal.SIGSTOP)
        asked = asyncio.create_task(service.stats())
        await asyncio.sleep(0.05)
        os.kill(service.pid, signal.SIGKILL)
        await asyncio.wait_for(asked, 0.7)

    run(body)


def test_an_end_while_loading_is_quick_and_tells_who_waits() -> None:
    async def body(service: ProcessService) -> None:
        waiting = asyncio.create_task(service.ready())
        await asyncio.sleep(0.1)
        started = time.monotonic()
        await service.drain(1)
        with pytest.raises(EngineUnavailable, match="shutting down"):
            await waiting
        await service.close()
        assert time.monotonic() - started < 2

    run(body, load_for_ever)


def test_a_model_that_does_not_load_says_why() -> None:
    async def body(service: ProcessService) -> None:
        with pytest.raises(ModelNotFound, match="nowhere") as caught:
            await service.ready(30)
        assert caught.value.field == "model"
        assert service.state == "failed"

    run(body, refuse)


def test_an_engine_that_always_crashes_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.engine.process.service.CRASHES_ALLOWED", 1)

    async def body(service: ProcessService) -> None:
        with pytest.raises(HeadraceError, match="died 2 times"):
            await service.ready(30)

    run(body, crash_at_once)


def test_an_engine_that_crashes_while_it_loads_is_given_up_however_long_it_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("headrace.engine.process.service.CRASHES_ALLOWED", 1)
    monkeypatch.setattr("headrace.engine.process.service.CRASH_WINDOW_S", 0.1)

    async def body(service: ProcessService) -> None:
        with pytest.raises(HeadraceError, match="died 2 times"):
            await service.ready(30)

    run(body, crash_after_a_while)


def test_a_process_that_cannot_be_started_again_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(service: ProcessService) -> None:
        await service.ready(30)
        start, failures = Link.start, []

        def fail_once(link: Link) -> None:
            if not failures:
                failures.append(link)
                raise OSError("no process left")
            start(link)

        monkeypatch.setattr(Link, "start", fail_once)
        os.kill(service.pid, signal.SIGKILL)
        while service.state == "ready":
            await asyncio.sleep(0.01)
        await service.ready(30)
        assert len(failures) == 1
        assert await collect(service, request("a", [1], max_tokens=2))

    run(body)


def test_drain_lets_open_requests_end_and_refuses_new_ones() -> None:
    async def body(service: ProcessService) -> None:
        await service.ready(30)
        job = request("a", [1, 2], max_tokens=100, ignore_eos=True)
        task = asyncio.create_task(collect(service, job))
        await asyncio.sleep(0.05)
        await service.drain(20)
        assert task.done() or (await task)
        assert [t for d in task.result()[0] for t in d.tokens] == answer(job)
        with pytest.raises(EngineUnavailable, match="draining"):
            service.submit(request("b", [1]))

    run(body)


def test_signals_to_the_whole_group_leave_the_engine_to_the_server() -> None:
    """A service manager signals every process: the engine goes on until the server has drained."""

    async def body(service: ProcessService) -> None:
        await service.ready(30)
        job = request("a", [1, 2], max_tokens=100, ignore_eos=True)
        task = asyncio.create_task(collect(service, job))
        await asyncio.sleep(0.05)
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(service.pid, number)
        assert [t for d in (await task)[0] for t in d.tokens] == answer(job)

    run(body)


SERVER = """
import asyncio
from headrace.engine.process.service import ProcessService
from tests.engine.process.test_service import serve

async def main():
    service = ProcessService(serve)
    await service.start()
    await service.ready(30)
    print(service.pid, flush=True)
    await asyncio.sleep(60)

if __name__ == "__main__":
    asyncio.run(main())
"""


def test_the_engine_ends_when_its_server_is_killed(tmp_path: Path) -> None:
    """Nobody is left to tell it: the pipe's end is enough, and no engine stays behind."""
    script = tmp_path / "server.py"
    script.write_text(SERVER)
    root = Path(__file__).parents[3]
    server = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}
    )
    assert server.stdout is not None
    engine_pid = int(server.stdout.readline())
    server.kill()
    server.wait()
    deadline = time.monotonic() + 20
    while psutil.pid_exists(engine_pid) and psutil.Process(engine_pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the engine outlived its server"
        time.sleep(0.05)


def test_seeds_are_drawn_when_none_is_given() -> None:
    async def body(service: ProcessService) -> None:
        await service.ready(30)
        jobs = [Request(f"r{i}", (1, 2), SamplingParams(max_tokens=12, ignore_eos=True)) for i in range(4)]
        texts = [tuple(t for d in (await collect(service, j))[0] for t in d.tokens) for j in jobs]
        assert len(set(texts)) > 1

    run(body)
