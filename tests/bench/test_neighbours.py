"""Whose processor time counts as somebody else's."""

from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest

from headrace.bench import neighbours
from headrace.bench.neighbours import Neighbours


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Four clocks that a test turns by hand: wall, all processors, our own time and that of a child."""
    state = SimpleNamespace(wall=0.0, busy=0.0, own=0.0, child=0.0, alive=True)

    def process(name: str) -> SimpleNamespace:
        def cpu_times() -> SimpleNamespace:
            if name == "child" and not state.alive:
                raise psutil.NoSuchProcess(1)
            ended = 0.0 if name == "child" or state.alive else state.child
            spent = state.own if name == "own" else state.child
            return SimpleNamespace(user=spent, system=0.0, children_user=ended, children_system=0.0)

        return SimpleNamespace(cpu_times=cpu_times, children=lambda recursive: [process("child")])

    class Times(tuple[float, ...]):
        idle, iowait, guest, guest_nice = 500.0, 20.0, 3.0, 0.0

    monkeypatch.setattr(psutil, "cpu_times", lambda: Times((state.busy, 500.0, 20.0, 3.0, 0.0)))
    monkeypatch.setattr(psutil, "Process", lambda: process("own"))
    monkeypatch.setattr(neighbours, "time", SimpleNamespace(monotonic=lambda: state.wall))
    return state


def test_what_we_and_our_children_use_is_ours(machine: SimpleNamespace) -> None:
    watch = Neighbours()
    machine.wall, machine.busy, machine.own, machine.child = 10.0, 13.0, 2.0, 6.0
    assert watch.cores() == pytest.approx(0.5)
    machine.wall, machine.busy = 20.0, 28.0
    assert watch.cores() == pytest.approx(1.5), "since it was last asked"


def test_a_child_that_ended_stays_ours(machine: SimpleNamespace) -> None:
    watch = Neighbours()
    machine.wall, machine.busy, machine.child, machine.alive = 10.0, 8.0, 8.0, False
    assert watch.cores() == pytest.approx(0.0)


def test_the_real_clocks_can_be_read() -> None:
    assert 0.0 <= Neighbours().cores() < 1e6
