"""Classes, and what the server's tiers mean by them."""

from __future__ import annotations

import pytest

from headrace.core.errors import InvalidRequest
from headrace.core.request import SLO
from headrace.server.slo.classes import SLOClasses, parse_class, parse_targets, parse_tier

CHAT, CODE = SLO(1000, 50), SLO(None, 25)


@pytest.mark.parametrize(
    ("text", "slo"),
    [
        ("tpot=50ms,ttft=1s", SLO(1000, 50)),
        (" ttft = 1.5s ", SLO(1500, None)),
        ("tpot_ms=0.5", SLO(None, 0.5)),
        ("ttft=2m,tpot_ms=2e3,", SLO(120_000, 2000)),
        ("none", SLO()),
    ],
)
def test_targets(text: str, slo: SLO) -> None:
    assert parse_targets(text, field="f", what="it") == slo
    assert parse_class(f"chat:{text}") == ("chat", slo)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no target"),
        ("x", "'x' is no target"),
        ("tpot=50", "tpot is '50': give a duration above 0 with its unit"),
        ("tpot=-1ms", "'-1ms'"),
        ("tpot=0ms", "above 0"),
        ("tpot=nan ms", "'nan ms'"),
        ("tpot_ms=1e99", "'1e99'"),
        ("ttft_ms=50ms", "milliseconds"),
        ("tpot=1ms,tpot_ms=2", "tpot is given twice"),
        ("ttft_ms=1;tpot_ms=2", "'1;tpot_ms=2'"),
        ("tpot=٣ms", "give a duration"),
    ],
)
def test_bad_targets_name_field_value_and_remedy(text: str, says: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_targets(text, field="f", what="it")
    assert says in caught.value.message
    assert caught.value.message.startswith("it: ")
    assert caught.value.field == "f"


@pytest.mark.parametrize("text", ["chat", ":tpot=1ms", "1x:tpot=1ms", "a b:tpot=1ms", "none:tpot=1ms", "auto:tpot=1ms"])
def test_bad_classes(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_class(text)
    assert caught.value.field == "slo_class"


def test_tiers() -> None:
    plain = SLOClasses({"chat": CHAT, "code": CODE}, "chat", {"priority": "code"})
    found = {tier: plain.of_tier(tier) for tier in (None, "auto", "default", "flex", "scale", "priority", "code")}
    assert found == {
        None: "chat", "auto": "chat", "default": "chat", "flex": "none", "scale": "chat", "priority": "code", "code": "code",
    }  # fmt: skip
    own = SLOClasses({"flex": SLO(None, 900), "default": CHAT})
    assert (own.default, own.of_tier("flex"), own.of_tier(None)) == ("default", "flex", "default")
    assert SLOClasses().of_tier("priority") == "none"


def test_an_unknown_tier_or_class_names_those_there_are() -> None:
    classes = SLOClasses({"chat": CHAT})
    with pytest.raises(InvalidRequest, match="auto, default, flex, scale, priority, chat") as caught:
        classes.of_tier("turbo")
    assert caught.value.field == "service_tier"
    with pytest.raises(InvalidRequest, match="chat, none"):
        classes.named("turbo", "slo")
    assert classes.named("none", "slo") == SLO()


@pytest.mark.parametrize("text", ["priority", "priority=", "=chat"])
def test_bad_tiers(text: str) -> None:
    with pytest.raises(InvalidRequest, match="priority=chat"):
        parse_tier(text)


def test_tiers_are_openais_and_their_classes_known() -> None:
    with pytest.raises(InvalidRequest, match="'turbo' is none of OpenAI's"):
        SLOClasses({"chat": CHAT}, tiers={"turbo": "chat"})
    with pytest.raises(InvalidRequest, match="'talk', which is unknown: give one of chat, none"):
        SLOClasses({"chat": CHAT}, tiers={"flex": "talk"})
    with pytest.raises(InvalidRequest, match="'talk'"):
        SLOClasses({"chat": CHAT}, "talk")


def test_additions_win_and_the_default_stays() -> None:
    base = SLOClasses({"chat": CHAT}, "chat")
    more = base.with_({"chat": CODE}, None, {"flex": "none"})
    assert (more.classes["chat"], more.default, more.tiers) == (CODE, "chat", {"flex": "none"})
    assert SLOClasses().with_({"default": CHAT}, None, {}).default == "default"
