"""Where the cache is, and that nobody else may write to it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from headrace.core.cache import CacheUnavailable, cache_folder


def test_the_first_variable_set_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HEADRACE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder("a") == tmp_path / "home" / ".cache" / "headrace" / "a"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder("a") == tmp_path / "xdg" / "headrace" / "a"
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path / "own"))
    assert cache_folder("a") == tmp_path / "own" / "a"


def test_it_is_closed_to_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path / "own"))
    cache_folder("a").chmod(0o777)
    assert cache_folder("a").stat().st_mode & 0o777 == 0o700
    uid = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    with pytest.raises(CacheUnavailable, match="another user: set HEADRACE_CACHE"):
        cache_folder("a")


def test_an_impossible_one_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path / "file"))
    with pytest.raises(CacheUnavailable, match="set HEADRACE_CACHE to a writable one"):
        cache_folder("a")
