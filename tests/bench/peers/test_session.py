"""The exchange with a driver's process: what a well one says arrives, and what a sick one does ends it and nothing else."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from tests.bench.peers.fakes import alive, checkpoint, fake_peer

from headrace.bench.peers import PeerFailed, start
from headrace.bench.peers.session import Driver, environment_of

PROMPTS = [[5, 6], [7, 8]]


def test_a_well_peer_answers_with_tokens_and_its_own_seconds(tmp_path: Path) -> None:
    with start(fake_peer(tmp_path), checkpoint(tmp_path / "model"), "int8") as session:
        assert session.ran == "fake int8"
        answer = session.generate(PROMPTS, 3)
    assert answer.tokens == [[7, 8, 9], [9, 10, 11]]
    assert 0 <= answer.seconds < 60


@pytest.mark.parametrize(
    ("behaviour", "says"),
    [
        ("hang", r"gave no answer to 'generate' within 1 s"),
        ("crash", r"ended during 'generate' \(status 7\); its last words: out of cheese"),
        ("raise", r"refused 'generate': ValueError: prompt too long"),
        ("short", r"made \[3\] tokens where 3 were wanted from each of 2"),
    ],
)
def test_what_goes_wrong_is_named(behaviour: str, says: str, tmp_path: Path) -> None:
    with (
        start(fake_peer(tmp_path, behaviour), checkpoint(tmp_path / "model"), "fp32") as session,
        pytest.raises(PeerFailed, match=says),
    ):
        session.generate(PROMPTS, 3, timeout_s=1.0 if behaviour == "hang" else 120.0)


def test_a_driver_that_talks_nonsense_is_ended(tmp_path: Path) -> None:
    with pytest.raises(PeerFailed, match=r"Segmentation fault, or so.*not the drivers' protocol"):
        start(fake_peer(tmp_path, "garbage"), checkpoint(tmp_path / "model"), "fp32")


def test_a_start_that_takes_too_long_is_given_up(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(PeerFailed, match="no answer to 'load' within 2 s"):
        start(fake_peer(tmp_path, "slow start"), checkpoint(tmp_path / "model"), "fp32", load_s=2.0)
    assert time.monotonic() - started < 55, "waited for the driver instead of giving it up"


def test_a_refusal_leaves_the_peer_alive_and_a_death_does_not(tmp_path: Path) -> None:
    with start(fake_peer(tmp_path), checkpoint(tmp_path / "model"), "fp32") as session:
        with pytest.raises(PeerFailed, match="no open-loop mode"):
            session.replay([], 60)
        assert session.generate([[1]], 1).tokens == [[2]]
    with start(fake_peer(tmp_path, "crash"), checkpoint(tmp_path / "model"), "fp32") as session:
        for says in ("ended during", "is not running"):
            with pytest.raises(PeerFailed, match=says):
                session.generate([[1]], 1)


def test_closing_ends_a_paused_peer_and_all_it_started(tmp_path: Path) -> None:
    session = start(fake_peer(tmp_path, "leaves children"), checkpoint(tmp_path / "model"), "fp32")
    child = int(session.ran)
    assert alive(child)
    session.pause()
    session.close()
    deadline = time.monotonic() + 60
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(child)
    session.close()


def test_a_paused_peer_does_nothing_until_it_is_resumed(tmp_path: Path) -> None:
    with start(fake_peer(tmp_path), checkpoint(tmp_path / "model"), "fp32") as session:
        pid = session._driver._process.pid
        session.pause()
        deadline = time.monotonic() + 60
        while _state(pid) != "T" and time.monotonic() < deadline:
            time.sleep(0.01)
        assert _state(pid) == "T"
        session.resume()
        assert session.generate([[1]], 2).tokens == [[2, 3]]


def test_a_command_that_does_not_exist_is_a_failed_peer(tmp_path: Path) -> None:
    with pytest.raises(PeerFailed, match="nobody does not start"):
        Driver("nobody", [str(tmp_path / "python")], {})


def test_signals_to_a_driver_that_has_ended_do_nothing(tmp_path: Path) -> None:
    session = start(fake_peer(tmp_path), checkpoint(tmp_path / "model"), "fp32")
    session.close()
    session._driver.signal(signal.SIGSTOP)


def test_the_environment_leads_no_python_astray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    found = environment_of(2)
    assert "PYTHONPATH" not in found
    assert found["OMP_NUM_THREADS"] == "2"


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
