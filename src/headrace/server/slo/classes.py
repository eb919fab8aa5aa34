"""Service classes: latency targets by name, and which of them OpenAI's service tiers mean. Pure.

A class is a name and an :class:`headrace.core.request.SLO`. Two names are always there: ``none`` has no targets, and
``custom`` stands in reports for targets that a request brought along.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from headrace.core.errors import InvalidRequest
from headrace.core.request import SLO

NONE = "none"
CUSTOM = "custom"
TIERS = ("auto", "default", "flex", "scale", "priority")
"""OpenAI's service tiers."""

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")
_DURATION = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,6})?(?:e[0-9])?)\s?(ms|s|m)", re.ASCII)
_MILLISECONDS = re.compile(r"[0-9]{1,9}(?:\.[0-9]{1,6})?(?:e[0-9])?", re.ASCII)
_UNITS = {"ms": 1.0, "s": 1e3, "m": 6e4}
_FILE_KEYS = {"classes", "default", "service_tiers"}
_EXAMPLE = "tpot=50ms,ttft=1s"


@dataclass(frozen=True, slots=True)
class SLOClasses:
    """The classes a server knows.

    Attributes:
        classes: targets by name.
        default: the class of requests that name none; by default the class called ``default``, else ``none``.
        tiers: what OpenAI's tiers mean where it is not a class of their own name: tier -> class.
    """

    classes: Mapping[str, SLO] = field(default_factory=dict)
    default: str = ""
    tiers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.classes:
            _check_name(name)
        if not self.default:
            object.__setattr__(self, "default", "default" if "default" in self.classes else NONE)
        self._check_known(self.default, "the default class", "default_slo_class")
        for tier, name in self.tiers.items():
            if tier not in TIERS or tier == "auto":
                allowed = ", ".join(TIERS[1:])
                raise InvalidRequest(f"service tier {tier[:64]!r} is none of OpenAI's: {allowed}", field="service_tier")
            self._check_known(name, f"the class of service tier {tier!r}", "service_tier")

    def _check_known(self, name: str, what: str, field: str) -> None:
        if name != NONE and name not in self.classes:
            raise InvalidRequest(f"{what} is {name[:64]!r}, which is unknown: {self._choices()}", field=field)

    def _choices(self) -> str:
        return f"give one of {', '.join(self.names())}"

    def names(self) -> tuple[str, ...]:
        """Every class, ``none`` last."""
        return (*self.classes, NONE)

    def tier_names(self) -> tuple[str, ...]:
        """What ``service_tier`` may be."""
        return tuple(dict.fromkeys((*TIERS, *self.classes)))

    def named(self, name: str, field: str) -> SLO:
        """The targets of class ``name``; raises :class:`InvalidRequest`, naming ``field``, when there is none."""
        if name == NONE:
            return SLO()
        if name not in self.classes:
            raise InvalidRequest(f"{field}: no class {name[:64]!r} here: {self._choices()}", field=field)
        return self.classes[name]

    def of_tier(self, tier: str | None) -> str:
        """The class that a ``service_tier`` means: its mapping, else the class of that name, else ``none`` for flex (best
        effort) and the default class for the others; raises :class:`InvalidRequest` for an unknown tier."""
        if tier is None or tier == "auto":
            return self.default
        if tier in self.tiers:
            return self.tiers[tier]
        if tier in self.classes:
            return tier
        if tier not in TIERS:
            raise InvalidRequest(
                f"service_tier {tier[:64]!r} is unknown here: give one of {', '.join(self.tier_names())}",
                field="service_tier",
            )
        return NONE if tier == "flex" else self.default

    def with_(self, classes: Mapping[str, SLO], default: str | None, tiers: Mapping[str, str]) -> SLOClasses:
        """A copy to which these are added; what has the same name is replaced."""
        kept = "" if self.default == NONE or "default" in classes else self.default
        return SLOClasses({**self.classes, **classes}, default or kept, {**self.tiers, **tiers})


def parse_class(text: str) -> tuple[str, SLO]:
    """``name:tpot=50ms,ttft=1s`` (either may be left out; ``name:none`` has no targets) as the name and its targets."""
    name, colon, targets = text.partition(":")
    if not colon:
        raise InvalidRequest(
            f"SLO class {text[:80]!r} has no targets: write it like chat:{_EXAMPLE}, or {text[:20]}:{NONE} for none",
            field="slo_class",
        )
    _check_name(name.strip())
    return name.strip(), parse_targets(targets, field="slo_class", what=f"SLO class {name.strip()!r}")


def parse_tier(text: str) -> tuple[str, str]:
    """``priority=chat`` as (tier, class)."""
    tier, equals, name = text.partition("=")
    if not (equals and tier.strip() and name.strip()):
        raise InvalidRequest(f"--service-tier {text[:80]!r}: write it like priority=chat", field="service_tier")
    return tier.strip(), name.strip()


def parse_targets(text: str, *, field: str, what: str) -> SLO:
    """``tpot=50ms,ttft=1s``, or ``tpot_ms=50,ttft_ms=1000``, as targets; ``none`` is none.

    Raises:
        InvalidRequest: naming ``field`` and beginning with ``what``.
    """
    if text.strip() == NONE:
        return SLO()
    targets: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, _, value = (word.strip() for word in part.partition("="))
        metric = key.removesuffix("_ms")
        if metric not in ("tpot", "ttft"):
            raise InvalidRequest(f"{what}: {key[:40]!r} is no target: write {_EXAMPLE}", field=field)
        if f"{metric}_ms" in targets:
            raise InvalidRequest(f"{what}: {metric} is given twice: leave one out", field=field)
        targets[f"{metric}_ms"] = _milliseconds(key, value, field=field, what=what)
    if not targets:
        raise InvalidRequest(f"{what}: no target is given: write {_EXAMPLE}, or {NONE}", field=field)
    return SLO(**targets)


def _milliseconds(key: str, value: str, *, field: str, what: str) -> float:
    if key.endswith("_ms"):
        found = float(value) if _MILLISECONDS.fullmatch(value) else 0.0
        remedy = f"give milliseconds above 0, as in {key}=50"
    else:
        match = _DURATION.fullmatch(value)
        found = float(match[1]) * _UNITS[match[2]] if match else 0.0
        remedy = f"give a duration above 0 with its unit, as in {key}=50ms or {key}=1.5s"
    if not found > 0:
        raise InvalidRequest(f"{what}: {key} is {value[:40]!r}: {remedy}", field=field)
    return found


def from_document(document: Any, name: str) -> SLOClasses:
    """The classes of a parsed YAML file called ``name``; raises :class:`InvalidRequest` saying where it is wrong."""
    if not isinstance(document, dict) or not isinstance(document.get("classes"), dict):
        raise _file_error(name, "the file needs a mapping called classes, with the targets of each class")
    if unknown := set(map(str, document)) - _FILE_KEYS:
        raise _file_error(name, f"{min(unknown)!r} is unknown: there are {', '.join(sorted(_FILE_KEYS))}")
    classes = {}
    for key, targets in document["classes"].items():
        _check_name(str(key))
        classes[str(key)] = _document_targets(targets, name, f"class {key!r}")
    tiers = document.get("service_tiers") or {}
    if not isinstance(tiers, dict):
        raise _file_error(name, "service_tiers must map tiers to classes, as in priority: chat")
    try:
        return SLOClasses(classes, str(document.get("default") or ""), {str(k): str(v) for k, v in tiers.items()})
    except InvalidRequest as error:
        raise _file_error(name, error.message) from error


def _document_targets(targets: Any, name: str, what: str) -> SLO:
    """Targets as text, or as a mapping of ``tpot`` and ``ttft`` to durations; nothing at all is no targets."""
    if not targets or targets == NONE:
        return SLO()
    if isinstance(targets, dict):
        targets = ",".join(f"{key}={value}" for key, value in targets.items())
    if not isinstance(targets, str):
        raise _file_error(name, f"{what} is {targets!r:.40}: write {{tpot: 50ms, ttft: 1s}}")
    return parse_targets(targets, field="slo_classes", what=f"--slo-classes {name}: {what}")


def _file_error(name: str, reason: str) -> InvalidRequest:
    return InvalidRequest(f"--slo-classes {name}: {reason}", field="slo_classes")


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"SLO class name {name[:64]!r}: use a letter, then letters, digits, '.', '_' or '-' (64 at most)",
            field="slo_class",
        )
    if name in (NONE, CUSTOM, "auto"):
        raise InvalidRequest(f"SLO class name {name!r} has a meaning of its own: choose another", field="slo_class")
