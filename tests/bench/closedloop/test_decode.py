"""The closed loop over fake peers: who takes turns, what rows say, and what a peer that fails costs."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.bench.peers.fakes import checkpoint, fake_peer

from headrace.bench import peers
from headrace.bench.closedloop import decode
from headrace.bench.peers.catalog import Peer
from headrace.core.errors import InvalidRequest

TURNS = 2


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> decode.Setting:
    model = checkpoint(tmp_path / "model")
    (model / "config.json").write_text(json.dumps({"vocab_size": 1000}))
    monkeypatch.setattr(decode, "MemoryProbe", lambda threads: lambda: 20.0)
    return decode.Setting(
        checkpoint=model, precisions=("fp32",), batches=(1, 2), repeats=TURNS, prompt=3, new=4, threads=1, inside=False
    )


def use(monkeypatch: pytest.MonkeyPatch, *found: Peer) -> None:
    monkeypatch.setattr(peers, "discover", lambda folder, names: list(found))


def of_kind(rows: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["kind"] == kind]


def test_every_engine_gets_its_turn_at_every_batch_and_repeat(
    setting: decode.Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, fake_peer(tmp_path, name="a"), fake_peer(tmp_path, name="b"))
    rows = of_kind(decode.run(setting), "decode")
    assert [(r["repeat"], r["batch"], r["engine"]) for r in rows] == [
        (0, 1, "a"), (0, 1, "b"), (0, 2, "a"), (0, 2, "b"),
        (1, 1, "b"), (1, 1, "a"), (1, 2, "b"), (1, 2, "a"),
    ]  # fmt: skip
    for row in rows:
        took = row["seconds_all"] - row["seconds_one"]
        assert row["decode_tok_s"] == pytest.approx(row["batch"] * 3 / max(took, 1e-9))
        assert row["prefill_tok_s"] == pytest.approx(row["batch"] * 3 / row["seconds_one"])
        assert row["version"] == "1.0"
        assert row["ran"] == "fake fp32"


@pytest.mark.parametrize("behaviour", ["crash", "raise", "short", "garbage"])
def test_a_peer_that_fails_costs_its_own_rows_only(
    behaviour: str, setting: decode.Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, fake_peer(tmp_path, behaviour, name="sick"), fake_peer(tmp_path, name="well"))
    rows = decode.run(setting)
    assert Counter(row["engine"] for row in of_kind(rows, "decode")) == {"well": 2 * TURNS}
    assert [row["engine"] for row in of_kind(rows, "lost")] == ["sick"]
    assert of_kind(rows, "lost")[0]["why"]


def test_what_is_not_installed_or_not_converted_is_named_and_left_out(
    setting: decode.Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(
        monkeypatch,
        fake_peer(tmp_path, name="absent", version=None),
        fake_peer(tmp_path, name="unready", converts=True),
        fake_peer(tmp_path, name="well"),
    )
    rows = decode.run(replace(setting, convert=False, repeats=1))
    assert {row["engine"]: row["why"].split(":")[0] for row in of_kind(rows, "lost")} == {
        "absent": "absent is not installed",
        "unready": "the checkpoint is not converted for it yet",
    }
    assert {row["engine"] for row in of_kind(rows, "decode")} == {"well"}


def test_a_spent_budget_starts_no_engine_and_no_second_round(
    setting: decode.Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, fake_peer(tmp_path, name="a"))
    rows = decode.run(replace(setting, budget_s=0.0))
    assert [row["kind"] for row in rows] == ["lost"]
    assert "no time left" in rows[0]["why"]
    now = iter([0.0, 1.0])
    monkeypatch.setattr(decode, "time", SimpleNamespace(monotonic=lambda: next(now, 100.0)))
    monkeypatch.setattr(peers, "start", _started)
    rows = of_kind(decode.run(replace(setting, budget_s=10.0)), "decode")
    assert {row["repeat"] for row in rows} == {0}


def test_an_interrupted_run_keeps_what_it_has(
    setting: decode.Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, fake_peer(tmp_path, name="a"))
    sessions: list[_Fast] = []

    def started(*_: Any, **__: Any) -> Any:
        sessions.append(_Fast())
        return sessions[-1]

    monkeypatch.setattr(peers, "start", started)

    def interrupt(line: str) -> None:
        if "tok/s" in line:
            raise KeyboardInterrupt

    rows: list[dict[str, Any]] = []
    with pytest.raises(KeyboardInterrupt):
        decode.run(setting, rows=rows, report=interrupt)
    assert Counter(row["kind"] for row in rows) == {"agreement": 1, "decode": 1}
    assert [session.closed for session in sessions] == [True]


def test_the_inside_is_not_charged_to_the_turns(
    setting: decode.Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, fake_peer(tmp_path, name="a"))
    monkeypatch.setattr(peers, "start", _started)
    clock = [0.0]
    monkeypatch.setattr(decode, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def slow_inside(*_: Any, **__: Any) -> list[dict[str, Any]]:
        clock[0] += 500.0
        return []

    monkeypatch.setattr(decode, "inside_rows", slow_inside)
    rows = decode.run(replace(setting, inside=True, budget_s=10.0))
    assert {row["repeat"] for row in of_kind(rows, "decode")} == {0, 1}


def test_a_machine_without_room_leaves_engines_out(
    setting: decode.Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    use(monkeypatch, fake_peer(tmp_path, name="a"))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1 << 20})())
    assert "GiB of memory are free" in of_kind(decode.run(setting), "lost")[0]["why"]


def test_prompts_are_new_on_every_call_and_the_fixed_ones_are_not() -> None:
    prompts = decode.Prompts(0, 8, 500)
    assert prompts(2) != prompts(2)
    assert prompts.fixed(2) == prompts.fixed(2) == decode.Prompts(9, 8, 500).fixed(2)
    assert decode.Prompts(3, 8, 500)(2) == decode.Prompts(3, 8, 500)(2)
    assert all(5 <= token < 500 for prompt in prompts(50) for token in prompt)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [({"new": 1}, "at least 2"), ({"repeats": 0}, "repeats is 0"), ({"precisions": ("fp8",)}, "choose of fp32")],
)
def test_settings_that_cannot_be_measured_are_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        decode.Setting(**wrong)


def test_quick_measures_less_and_converts_nothing() -> None:
    full = decode.Setting()
    short = decode.quick(full)
    assert short.repeats < full.repeats
    assert short.new < full.new
    assert not short.convert
    assert short.budget_s
    assert "vllm" not in (short.engines or ())
    assert decode.quick(replace(full, engines=("headrace", "vllm"))).engines == ("headrace",)


class _Fast:
    """A session without a process, for tests of the order of things."""

    name, precision, ran, url, model = "a", "fp32", "fast", None, None
    closed = False

    def generate(self, prompts: list[list[int]], new: int) -> peers.Answer:
        return peers.Answer([[random.randrange(9)] * new for _ in prompts], 0.001 * new)

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def close(self) -> None:
        self.closed = True


def _started(*_: Any, **__: Any) -> Any:
    return _Fast()
