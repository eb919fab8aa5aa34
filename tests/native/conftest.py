"""Kernels compiled for each instruction set this machine can run."""

from __future__ import annotations

import ctypes
import dataclasses
import platform
from collections.abc import Callable
from pathlib import Path

import pytest

from headrace.native import build, skinny

_X86 = {"avx2": ("-mavx2", "-mfma"), "generic": ("-mtune=generic",)}


@pytest.fixture(scope="session")
def library_for(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ctypes.CDLL]:
    """Kernels for an instruction set of x86-64, compiled once."""
    found: dict[str, ctypes.CDLL] = {}

    def library(name: str) -> ctypes.CDLL:
        if name not in found:
            toolchain = build.find_toolchain()
            flags = tuple(flag for flag in toolchain.flags if not flag.startswith("-m")) + _X86[name]
            folder = tmp_path_factory.mktemp(f"kernels_{name}")
            found[name] = skinny.bind(build.open_library(dataclasses.replace(toolchain, flags=flags), folder))
        return found[name]

    return library


@pytest.fixture(params=["native", "avx2", "generic"])
def isa(
    request: pytest.FixtureRequest, library_for: Callable[[str], ctypes.CDLL], monkeypatch: pytest.MonkeyPatch
) -> str:
    """Point :class:`PackedMatrix` at kernels compiled for one instruction set, during one test."""
    name = str(request.param)
    if name == "native":
        return skinny.isa()
    if platform.machine() != "x86_64":
        pytest.skip("other instruction sets are those of x86-64")
    if name == "avx2" and not {"avx2", "fma"} <= set(Path("/proc/cpuinfo").read_text().split()):
        pytest.skip("this processor has no AVX2")
    library = library_for(name)
    monkeypatch.setattr(skinny, "_library", lambda: library)
    assert skinny.isa() == name
    return name
