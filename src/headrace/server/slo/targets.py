"""Which latency targets a request has. Pure.

The first of these that says anything decides alone, nothing is merged: the field ``slo``, the headers, ``service_tier``, the
server's default class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Header

from headrace.core.errors import InvalidRequest
from headrace.core.request import SLO
from headrace.server.api.schemas import GenerationBody
from headrace.server.slo.classes import CUSTOM, NONE, SLOClasses, parse_targets

CLASS_HEADER = "X-SLO-Class"
TARGETS_HEADER = "X-Headrace-SLO"


@dataclass(frozen=True, slots=True)
class SLOHeaders:
    """What the headers say; at most one of them is given."""

    name: str | None = None
    targets: str | None = None


def slo_headers(
    name: Annotated[str | None, Header(alias=CLASS_HEADER, description="A service class by name.")] = None,
    targets: Annotated[
        str | None,
        Header(alias=TARGETS_HEADER, description="Latency targets, as in `tpot=50ms,ttft=1s` or `tpot_ms=50`."),
    ] = None,
) -> SLOHeaders:
    """FastAPI dependency: the headers that may set targets."""
    if name and targets:
        raise InvalidRequest(
            f"{CLASS_HEADER} and {TARGETS_HEADER} are both given: send one of them", field=CLASS_HEADER
        )
    return SLOHeaders(name or None, targets or None)


Headers = Annotated[SLOHeaders, Depends(slo_headers)]


@dataclass(frozen=True, slots=True)
class Targets:
    """What a request is held to.

    Attributes:
        slo: the targets.
        name: the class under which attainment is counted; ``custom`` for targets of the request's own.
        tier: what to answer as ``service_tier``: the tier or class asked for ("default" for "auto", as OpenAI does), None when
            none was.
    """

    slo: SLO
    name: str
    tier: str | None


def resolve(body: GenerationBody, headers: SLOHeaders, classes: SLOClasses) -> Targets:
    """The request's targets; raises :class:`InvalidRequest` on an unknown class or tier, or a header that cannot be read.

    Whatever decides, all that is given must make sense: a mistake is told rather than overruled.
    """
    tier_class = classes.of_tier(body.service_tier)
    tier = "default" if body.service_tier == "auto" else body.service_tier
    from_header = _of_headers(headers, classes)
    if isinstance(body.slo, str):
        return Targets(classes.named(body.slo, "slo"), body.slo, tier)
    if body.slo is not None:
        own = SLO(body.slo.ttft_ms, body.slo.tpot_ms)
        return Targets(own, _own_name(own), tier)
    if from_header is not None:
        return Targets(*from_header, tier)
    return Targets(classes.named(tier_class, "service_tier"), tier_class, tier)


def _of_headers(headers: SLOHeaders, classes: SLOClasses) -> tuple[SLO, str] | None:
    if headers.name is not None:
        name = headers.name.strip()
        return classes.named(name, CLASS_HEADER), name
    if headers.targets is not None and headers.targets.strip(" ,"):
        own = parse_targets(headers.targets, field=TARGETS_HEADER, what=TARGETS_HEADER)
        return own, _own_name(own)
    return None


def _own_name(slo: SLO) -> str:
    return NONE if slo == SLO() else CUSTOM
