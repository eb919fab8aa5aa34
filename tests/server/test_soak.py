"""A hundred streams at once for a while: nothing fails but what is malformed, and nothing is left behind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.server.conftest import Running, Serve, eventually
from tests.server.fake_service import FakeService
from tests.server.swarm import Report, Swarm

from headrace.bench.sampler import Sampler

MIB = 1 << 20
KINDS = {"streamed", "whole", "left a stream", "left a wait", "read slowly", "malformed"}


class Watch(Sampler):
    """Resident memory of a process, sampled while something runs, in MiB."""

    def __init__(self, pid: int) -> None:
        process = psutil.Process(pid)
        self.samples: list[float] = []
        super().__init__(lambda: self.samples.append(process.memory_info().rss / MIB), 0.5)

    def growth(self) -> float:
        """Mean of the last fifth minus mean of the second fifth (the first one warms up)."""
        fifth = max(1, len(self.samples) // 5)
        early, late = self.samples[fifth : 2 * fifth], self.samples[-fifth:]
        return sum(late) / len(late) - sum(early) / len(early)


def assert_clean(report: Report, metrics: Callable[[], dict[str, float]]) -> None:
    """Nothing went wrong, every kind of client was there, and no sequence, slot or request is left."""
    assert not report.wrong, report.wrong[:5]
    assert set(report.done) == KINDS
    left = ("headrace_running_sequences", "headrace_waiting_sequences", "headrace_slots_used", "headrace_open_requests")
    assert eventually(lambda: not any(metrics()[name] for name in left), 20), {name: metrics()[name] for name in left}
    found = metrics()
    assert found["headrace_engine_aborted_total"] > 0 or found["headrace_engine_steps_total"] > 0


def test_hundred_clients_of_the_server_alone(serve: Serve) -> None:
    service = FakeService(delay_s=0.002)
    running = serve(service)
    with Watch(os.getpid()) as watch:
        report = Swarm(running.url, clients=100, seconds=5, max_tokens=60).run()
    assert_clean(report, running.metrics)
    assert not service.live
    assert watch.growth() < 40


def test_hundred_clients_of_the_whole_for_ten_seconds(real: Running) -> None:
    pid = real.service.pid
    with Watch(os.getpid()) as here, Watch(pid) as engine:
        report = Swarm(real.url, clients=100, seconds=10, max_tokens=24).run()
    assert_clean(report, real.metrics)
    assert real.service.pid == pid, "the engine must not have been restarted"
    assert here.growth() < 60
    assert engine.growth() < 60


def test_the_swarm_notices_errors(serve: Serve) -> None:
    """Negative control: a server that breaks some answers does not pass."""
    service = FakeService(fail_at=8)
    report = Swarm(serve(service).url, clients=10, seconds=1, max_tokens=60).run()
    assert report.wrong


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_hundred_clients_for_minutes() -> None:
    """``headrace serve`` as a user starts it; HEADRACE_SOAK_S seconds (180)."""
    seconds = float(os.environ.get("HEADRACE_SOAK_S", "180"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    # A small pool: pages of a large one are first touched late, which would look like a leak.
    options = ["--port", str(port), "--max-context", "1024", "--kv-gib", "0.05"]
    process = subprocess.Popen(
        [sys.executable, "-m", "headrace", "serve", *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, verify=False, trust_env=False)
    try:
        assert eventually(lambda: _healthy(http), 180, 0.5), "the server did not become ready"
        children = psutil.Process(process.pid).children(recursive=True)
        engine_pid = max(children, key=lambda child: child.memory_info().rss).pid
        with Watch(process.pid) as server, Watch(engine_pid) as engine:
            report = Swarm(str(http.base_url), clients=100, seconds=seconds, max_tokens=96).run()
        assert_clean(report, lambda: _metrics(http))
        assert psutil.pid_exists(engine_pid), "the engine must not have been restarted"
        for name, watch in (("server", server), ("engine", engine)):
            print(f"{name}: {watch.samples[-1]:.0f} MiB, grew by {watch.growth():.1f}")
            assert watch.growth() < 40
        print(dict(report.done))
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def _healthy(http: httpx.Client) -> bool:
    with suppress(httpx.HTTPError):
        return http.get("/health").status_code == 200
    return False


def _metrics(http: httpx.Client) -> dict[str, float]:
    families = text_string_to_metric_families(http.get("/metrics").text)
    return {sample.name: sample.value for family in families for sample in family.samples}
