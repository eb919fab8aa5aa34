"""Continuous batching of transformers, fed while it runs: times, tokens, and a clean table after a cut-off."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests import tiny

from headrace.bench.peers import Session
from headrace.bench.peers.catalog import DRIVERS
from headrace.bench.peers.session import start_driver


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    model: Path = tiny.checkpoint("llama", tmp_path_factory.mktemp("model"))
    driver = start_driver("cb", Path(sys.executable), DRIVERS / "drive_transformers.py", ["cb"], 1)
    try:
        loaded = driver.ask("load", 120, model=str(model), precision="fp32", threads=1, sequences=4, context=64)
        yield Session(driver, "fp32", loaded)
    finally:
        driver.close()


def request(number: int, at_s: float, new: int) -> dict[str, Any]:
    return {"id": str(number), "at_s": at_s, "prompt": [5 + number, 6, 7], "new": new}


def test_requests_come_when_they_are_due_and_are_timed(session: Session) -> None:
    first, second = session.replay([request(0, 0.0, 6), request(1, 0.5, 4)], 90.0)
    assert (first["tokens"], second["tokens"]) == (6, 4)
    assert 0.0 < first["first_s"] <= first["end_s"]
    assert 0.5 < second["first_s"] <= second["end_s"]


def test_what_is_open_at_the_cut_off_is_cancelled_and_disturbs_nothing(session: Session) -> None:
    rows = session.replay([request(0, 0.0, 50), request(1, 600.0, 4)], 0.05)
    assert all("end_s" not in row for row in rows)
    (again,) = session.replay([request(0, 0.0, 3)], 90.0)
    assert again["tokens"] == 3
    assert "end_s" in again
    assert [len(tokens) for tokens in session.generate([[5, 6, 7]] * 2, 4).tokens] == [4, 4]
