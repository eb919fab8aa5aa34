"""Conversion: once per checkpoint, precision and version; never half."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tests.bench.peers.fakes import checkpoint, fake_peer

from headrace.bench.peers import PeerFailed, checkpoint_digest, is_converted, start
from headrace.core.errors import BrokenCheckpoint


def test_a_checkpoint_is_converted_once_and_loaded_from_there(tmp_path: Path) -> None:
    peer, model = fake_peer(tmp_path / "peers", converts=True), checkpoint(tmp_path / "model")
    digest, heard = checkpoint_digest(model), []
    assert not is_converted(peer, digest, "int8")
    for _ in range(2):
        with start(peer, model, "int8", report=heard.append) as session:
            assert session.model == str(peer.converted(digest, "int8"))
    assert heard == ["fake: converting to int8"]
    assert is_converted(peer, digest, "int8")
    assert not is_converted(peer, digest, "fp32")
    assert not is_converted(replace(peer, version="2.0"), digest, "int8")
    assert json.loads((peer.converted(digest, "int8") / "converted.json").read_text()) == [str(model), "int8"]


def test_an_engine_that_loads_for_long_says_so_and_is_given_up_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["headrace.bench.peers.start"], "NEWS_S", 0.2)
    heard: list[str] = []
    with pytest.raises(PeerFailed, match="gave no answer to 'load' within 2 s"):
        start(
            fake_peer(tmp_path / "peers", "slow start"),
            checkpoint(tmp_path / "model"),
            "fp32",
            load_s=2.0,
            report=heard.append,
        )
    assert len(heard) >= 2
    assert heard[0] == "fake: loading, 0 s"


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path) -> None:
    peer, model = fake_peer(tmp_path / "peers", "cannot convert", converts=True), checkpoint(tmp_path / "model")
    with pytest.raises(PeerFailed, match="no such layer"):
        start(peer, model, "fp32")
    assert not [path for path in (tmp_path / "peers").rglob("*") if path.is_file()]
    assert not is_converted(peer, checkpoint_digest(model), "fp32")


def test_a_peer_that_is_not_here_or_cannot_is_named_with_the_remedy(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model")
    with pytest.raises(PeerFailed, match="fake is not installed: headrace bench peers install fake"):
        start(fake_peer(tmp_path, version=None), model, "fp32")
    with pytest.raises(PeerFailed, match="does not run int4: it runs fp32, int8"):
        start(fake_peer(tmp_path), model, "int4")


def test_the_digest_follows_the_contents_and_not_the_place(tmp_path: Path) -> None:
    one, twin, other = (
        checkpoint(tmp_path / name, weights) for name, weights in (("a", b"w"), ("b", b"w"), ("c", b"v"))
    )
    assert checkpoint_digest(one) == checkpoint_digest(twin) != checkpoint_digest(other)
    (twin / "notes.md").write_text("not read by any engine")
    assert checkpoint_digest(one) == checkpoint_digest(twin)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BrokenCheckpoint, match=r"no config\.json with safetensors"):
        checkpoint_digest(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BrokenCheckpoint):
        checkpoint_digest(tmp_path)
