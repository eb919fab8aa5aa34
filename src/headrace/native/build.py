"""Compiles ``src/*.cpp`` for this machine once and loads the result.

The library is kept in ``$HEADRACE_CACHE/native`` (else ``$XDG_CACHE_HOME/headrace/native``, else
``~/.cache/headrace/native``) under a name made of everything it depends on: sources, compiler and version, flags, processor
and OpenMP runtime. It is bound with ctypes, which lets go of the GIL during a call, and linked to the OpenMP runtime that
torch has loaded: a second runtime in the process would bring a second set of threads, and the two would fight over
the cores.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from headrace.core.cache import CacheUnavailable, cache_folder
from headrace.core.errors import HeadraceError

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "src"
COMPILE_TIMEOUT_S = 300
_OPENMP = re.compile(r"lib(gomp|iomp5|omp)[-.].*")


class NativeUnavailable(HeadraceError):
    """The kernels cannot be compiled or loaded here; the message says why and what to do."""

    code = "native_unavailable"


@dataclass(frozen=True, slots=True)
class Toolchain:
    """What a library is built with.

    Attributes:
        compiler: the command, split into words.
        version: what it says of itself.
        flags: for compiling.
        openmp: the OpenMP runtime to link, the one torch uses.
    """

    compiler: tuple[str, ...]
    version: str
    flags: tuple[str, ...]
    openmp: Path


@functools.cache
def _outcome() -> ctypes.CDLL | NativeUnavailable:
    try:
        return open_library(find_toolchain(), cache_dir())
    except NativeUnavailable as error:
        return error


def load() -> ctypes.CDLL:
    """The library, compiled if need be; tried once per process.

    Raises:
        NativeUnavailable: no compiler, no usable cache folder, or sources that do not compile here.
    """
    outcome = _outcome()
    if isinstance(outcome, NativeUnavailable):
        raise NativeUnavailable(outcome.message)
    return outcome


def available() -> bool:
    """Whether the kernels can be used in this process; compiles them at the first call."""
    return not isinstance(_outcome(), NativeUnavailable)


def why_not() -> str:
    """Why the kernels cannot be used, with the remedy; empty when they can."""
    outcome = _outcome()
    return outcome.message if isinstance(outcome, NativeUnavailable) else ""


def find_toolchain() -> Toolchain:
    """The compiler ($CXX, else g++, c++ or clang++) and flags for this machine.

    Raises:
        NativeUnavailable: when there is none, or none that can share torch's OpenMP runtime.
    """
    if os.name != "posix":
        raise NativeUnavailable(f"native kernels need a POSIX system, and this is {platform.system()}")
    named = os.environ.get("CXX", "").strip()
    candidates = [named] if named else ["g++", "c++", "clang++"]
    commands = (tuple(shlex.split(candidate)) for candidate in candidates)
    compiler = next((words for words in commands if shutil.which(words[0])), None)
    if compiler is None:
        found = f"CXX names {named!r}, which is not there" if named else "none of g++, c++ and clang++ is there"
        raise NativeUnavailable(
            f"no C++ compiler found ({found}): install one (Debian: apt install g++) or set CXX; linears='module' needs none"
        )
    version = _run([*compiler, "--version"])
    openmp = find_openmp()
    clang = "clang" in version
    if clang and openmp.name.startswith("libgomp"):
        raise NativeUnavailable(
            f"{compiler[0]} is clang, whose OpenMP cannot share torch's runtime ({openmp.name}): install g++ or set CXX to it"
        )
    tuned = "-march=native" if platform.machine().lower() in ("x86_64", "amd64") else "-mcpu=native"
    parallel = ("-Xclang", "-fopenmp") if clang else ("-fopenmp",)
    return Toolchain(compiler, version, ("-std=c++17", "-O3", tuned, "-fPIC", *parallel), openmp)


def find_openmp() -> Path:
    """The OpenMP runtime torch has loaded.

    Raises:
        NativeUnavailable: when torch was built without one.
    """
    import torch

    maps = Path("/proc/self/maps")
    loaded = maps.read_text(encoding="utf-8", errors="replace").split() if maps.exists() else []
    bundled = sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*"))
    for path in (*(Path(word) for word in loaded if word.startswith("/")), *bundled):
        if _OPENMP.fullmatch(path.name) and path.exists():
            return path
    raise NativeUnavailable(
        "this torch was built without OpenMP: install a torch wheel from PyPI, or use linears='module'"
    )


def cache_dir() -> Path:
    """The folder of compiled libraries, created if need be and closed to other users.

    Raises:
        NativeUnavailable: when it cannot be created, or belongs to somebody else, who could then choose the code we run.
    """
    try:
        return cache_folder("native")
    except CacheUnavailable as error:
        raise NativeUnavailable(f"no place for compiled kernels: {error.message}") from error


def open_library(toolchain: Toolchain, folder: Path) -> ctypes.CDLL:
    """Load the library from ``folder``, compiling it there first if it is missing or damaged.

    Safe among processes: one compiles, the others wait for it, and nobody ever sees half a file.

    Raises:
        NativeUnavailable: when it does not compile or load.
    """
    path = folder / f"kernels-{_key(toolchain)}.so"
    try:
        with _locked(path.with_suffix(".lock")):
            if not _intact(path):
                _compile(toolchain, path)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeUnavailable(
            f"the compiled kernels in {folder} cannot be used ({error}): set HEADRACE_CACHE to a writable folder on a file "
            "system that allows execution"
        ) from error


def _key(toolchain: Toolchain) -> str:
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        if source.suffix in (".cpp", ".h"):
            digest.update(f"{source.name}\0".encode() + source.read_bytes() + b"\0")
    facts = (*toolchain.compiler, toolchain.version, *toolchain.flags, toolchain.openmp.name, *_processor())
    digest.update("\0".join(facts).encode())
    return digest.hexdigest()[:32]


def _processor() -> tuple[str, ...]:
    """What the machine code depends on: model and instruction sets (virtual machines hide some of a model's)."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.machine(), platform.processor()
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
    fields = ("model name", "flags", "CPU implementer", "CPU part", "Features")
    return platform.machine(), *(next((line for line in lines if line.startswith(field)), "") for field in fields)


def _intact(path: Path) -> bool:
    """Whether the library is the one that was compiled. Loading a truncated one could kill the process, so look first."""
    try:
        return path.with_suffix(".sha256").read_text() == hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return False


def _compile(toolchain: Toolchain, path: Path) -> None:
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        objects = []
        for source in sorted(SOURCES.glob("*.cpp")):
            objects.append(f"{scratch}/{source.stem}.o")
            _run([*toolchain.compiler, *toolchain.flags, "-c", str(source), "-o", objects[-1]])
        built = Path(scratch) / path.name
        # Linked by hand, without -fopenmp, which would add the compiler's own runtime.
        _run([*toolchain.compiler, "-shared", *objects, str(toolchain.openmp), "-o", str(built)])
        total = built.with_suffix(".sha256")
        total.write_text(hashlib.sha256(built.read_bytes()).hexdigest())
        total.replace(path.with_suffix(".sha256"))
        built.replace(path)
    log.info("compiled the native kernels in %.1f s: %s", time.perf_counter() - started, path)


def _run(command: list[str]) -> str:
    """Standard output of ``command``, which runs without a shell."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailable(f"{command[0]} could not be run ({error}): set CXX to a working compiler") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        why = lines[0].strip() if lines else f"exit status {done.returncode}"
        raise NativeUnavailable(f"{command[0]} failed ({why}): set CXX to another compiler, or use linears='module'")
    return done.stdout


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock between processes; the kernel frees it should we die."""
    import fcntl

    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
