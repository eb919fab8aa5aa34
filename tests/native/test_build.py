"""The compiler cache: one library however many processes ask, damage mended, refusals explained."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace.native import build

PROBE = "from headrace.native import build; build.load(); print(*build.cache_dir().glob('*.so'))"


@pytest.fixture
def toolchain() -> build.Toolchain:
    try:
        return build.find_toolchain()
    except build.NativeUnavailable as error:
        pytest.skip(f"no compiler: {error}")


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toolchain: build.Toolchain) -> build.Toolchain:
    """A source that compiles in no time, in place of the kernels."""
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "answer.cpp").write_text('#include "answer.h"\nextern "C" int answer() { return ANSWER; }\n')
    (sources / "answer.h").write_text("#define ANSWER 42\n")
    monkeypatch.setattr(build, "SOURCES", sources)
    return toolchain


@pytest.fixture
def forgetful() -> Iterator[None]:
    """Let this process look for a compiler afresh, now and after the test."""
    build._outcome.cache_clear()
    yield
    build._outcome.cache_clear()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    folder = tmp_path / "cache"
    folder.mkdir()
    return folder


def test_the_runtime_is_the_one_torch_uses(toolchain: build.Toolchain) -> None:
    code = (
        "import re; from headrace.native import build; import torch; build.load(); torch.ones(9).sum()\n"
        "maps = open('/proc/self/maps').read(); print(*sorted(set(re.findall(r'/\\S*lib(?:gomp|omp|iomp5)[-.]\\S*', maps))))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert loaded == [str(toolchain.openmp)]


def test_four_processes_compile_once(tmp_path: Path, toolchain: build.Toolchain) -> None:
    environment = {**os.environ, "HEADRACE_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", "import logging; logging.basicConfig(level='INFO'); " + PROBE]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(command, env=environment, **pipes) for _ in range(4)]  # type: ignore[call-overload]
    ended = [process.communicate(timeout=200) for process in started]
    assert [process.returncode for process in started] == [0] * 4, ended
    assert sum(err.count("compiled the native kernels") for _, err in ended) == 1
    assert len({out for out, _ in ended}) == 1
    assert len(list((tmp_path / "native").glob("*.so"))) == 1


def test_a_damaged_library_is_compiled_again(tiny: build.Toolchain, cache: Path) -> None:
    build.open_library(tiny, cache)
    (library,) = cache.glob("*.so")
    whole = library.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", whole[:-1] + b"?"):
        library.unlink()
        library.write_bytes(damaged)
        assert build.open_library(tiny, cache).answer() == 42
        assert library.read_bytes() == whole


def test_an_intact_library_is_kept(tiny: build.Toolchain, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build.open_library(tiny, cache)
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("compiled again"))
    assert build.open_library(tiny, cache).answer() == 42


@pytest.mark.parametrize("changed", ["source", "header", "flags", "version", "openmp", "processor"])
def test_whatever_matters_is_in_the_name(tiny: build.Toolchain, monkeypatch: pytest.MonkeyPatch, changed: str) -> None:
    before = build._key(tiny)
    assert build._key(tiny) == before
    if changed == "source":
        (build.SOURCES / "answer.cpp").write_text("// other\n")
    elif changed == "header":
        (build.SOURCES / "answer.h").write_text("#define ANSWER 43\n")
    elif changed == "processor":
        monkeypatch.setattr(build, "_processor", lambda: ("another",))
    else:
        value = {"flags": ("-O0",), "version": "another", "openmp": Path("libgomp-1.so")}[changed]
        tiny = dataclasses.replace(tiny, **{changed: value})  # type: ignore[arg-type]
    assert build._key(tiny) != before


def test_sources_that_do_not_compile_are_explained(tiny: build.Toolchain, cache: Path) -> None:
    (build.SOURCES / "answer.cpp").write_text("int broken(\n")
    with pytest.raises(build.NativeUnavailable, match=r"answer\.cpp.*error.*linears='module'"):
        build.open_library(tiny, cache)
    assert not list(cache.glob("*.so"))
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, forgetful: None, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not build.available()
    assert "no C++ compiler found" in build.why_not()
    assert "apt install g++" in build.why_not()
    with pytest.raises(build.NativeUnavailable, match="no C"):
        build.load()


def test_a_missing_cxx_is_not_replaced_by_another(monkeypatch: pytest.MonkeyPatch, forgetful: None) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++ -x")
    assert "CXX names '/nowhere/c++ -x'" in build.why_not()


def test_clang_is_refused_where_it_would_bring_a_second_runtime(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, toolchain: build.Toolchain
) -> None:
    clang = tmp_path / "clang++"
    clang.write_text("#!/bin/sh\necho clang version 17\n")
    clang.chmod(0o755)
    monkeypatch.setenv("CXX", str(clang))
    monkeypatch.setattr(build, "find_openmp", lambda: Path("/torch/lib/libgomp.so.1"))
    with pytest.raises(build.NativeUnavailable, match=r"clang.*install g\+\+"):
        build.find_toolchain()
    monkeypatch.setattr(build, "find_openmp", lambda: Path("/torch/lib/libomp.dylib"))
    assert "-Xclang" in build.find_toolchain().flags


def test_available(monkeypatch: pytest.MonkeyPatch, toolchain: build.Toolchain) -> None:
    assert build.available(), build.why_not()
    assert build.why_not() == ""
    assert isinstance(build.load(), ctypes.CDLL)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HEADRACE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert build.cache_dir() == tmp_path / "xdg" / "headrace" / "native"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert build.cache_dir() == tmp_path / "home" / ".cache" / "headrace" / "native"
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path / "own"))
    assert build.cache_dir() == tmp_path / "own" / "native"


def test_the_cache_is_closed_to_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path / "own"))
    folder = build.cache_dir()
    folder.chmod(0o777)
    assert build.cache_dir().stat().st_mode & 0o777 == 0o700
    uid = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    with pytest.raises(build.NativeUnavailable, match="belongs to another user"):
        build.cache_dir()


def test_an_impossible_cache_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path / "file"))
    with pytest.raises(build.NativeUnavailable, match="set HEADRACE_CACHE to a writable one"):
        build.cache_dir()
