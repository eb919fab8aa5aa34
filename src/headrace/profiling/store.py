"""Profiles on disk: one readable JSON file per model, device and versions."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from headrace.core.batch import StepShape
from headrace.core.cache import CacheUnavailable, cache_folder
from headrace.profiling.profile import MeasuredProfile, Point

log = logging.getLogger(__name__)

FORMAT = 2

MOST_BYTES = 4 << 20
"""Larger files are none of ours."""


@dataclass(frozen=True, slots=True)
class ProfileKey:
    """Everything a measured cost depends on.

    Attributes:
        model: a hash of the model's configuration.
        device: name of the processor or GPU, with the threads used.
        dtype, attention, linears, kv_dtype, quantize: how the model runs.
        tp: devices one layer is split over.
        versions: package -> version.
    """

    model: str
    device: str
    dtype: str
    attention: str
    linears: str
    kv_dtype: str = "auto"
    quantize: str = "none"
    tp: int = 1
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """32 hexadecimal digits, the file's name."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def path_of(key: ProfileKey, folder: Path | None = None) -> Path:
    """Where the profile of ``key`` is kept; ``folder`` is ``profiles`` in the user's cache by default.

    Raises:
        CacheUnavailable: there is no such folder and none can be made.
    """
    return (folder or cache_folder("profiles")) / f"{key.digest}.json"


def save(profile: MeasuredProfile, key: ProfileKey, path: Path) -> None:
    """Write the measured points and what was learnt since in one move, so that no reader ever sees half a file; raises OSError."""
    data = {
        "format": FORMAT,
        "key": asdict(key),
        "correction": profile.correction.factors,
        "points": [{**asdict(p.shape), "p50_ms": p.p50, "ms": list(p.ms)} for p in profile.points],
    }
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
            json.dump(data, handle, indent=1)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read(path: Path, key: ProfileKey | None = None) -> MeasuredProfile:
    """Read a profile, whatever it was measured for unless ``key`` says.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, of another format, or measured under another key; the message says which.
    """
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"it is larger than {MOST_BYTES >> 20} MiB")
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    try:
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']!r} instead of {FORMAT}")
        if key is not None and data["key"] != asdict(key):
            raise ValueError("it was measured for something else")
        names = tuple(StepShape.__dataclass_fields__)
        profile = MeasuredProfile(
            [Point(StepShape(*(int(p[n]) for n in names)), tuple(float(v) for v in p["ms"])) for p in data["points"]]
        )
        profile.correction.restore({str(name): float(factor) for name, factor in data["correction"].items()})
        return profile
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"a field is missing or of the wrong kind ({error})") from error


def load_or_measure(
    key: ProfileKey,
    measure: Callable[[], MeasuredProfile],
    *,
    folder: Path | None = None,
    path: Path | None = None,
    again: bool = False,
) -> MeasuredProfile:
    """The stored profile of ``key``, or a fresh one, which is then stored.

    A damaged file is measured again with a warning. A cache that cannot be used costs a warning too, never the run.

    Args:
        key: what the profile depends on.
        measure: makes a fresh one.
        folder: where profiles are kept; the user's cache by default.
        path: this very file instead.
        again: measure even if there is one.
    """
    try:
        path = path or path_of(key, folder)
    except CacheUnavailable as error:
        log.warning("the profile will not be kept: %s", error.message)
        return measure()
    if path.exists() and not again:
        try:
            return read(path, key)
        except (OSError, ValueError) as error:
            log.warning("the profile %s cannot be used (%s): measuring again", path, error)
    profile = measure()
    keep(profile, key, path)
    return profile


def keep(profile: MeasuredProfile, key: ProfileKey, path: Path | None = None) -> None:
    """:func:`save` to ``path`` or where ``key`` belongs; a folder that cannot be written costs a warning only."""
    try:
        save(profile, key, path or path_of(key))
    except (OSError, CacheUnavailable) as error:
        log.warning("the profile could not be written (%s)", error)
