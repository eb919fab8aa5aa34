"""Sampling parameters and latency targets refuse what makes no sense, by the field's name."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest

from headrace.core.clock import VirtualClock
from headrace.core.config import EngineConfig
from headrace.core.errors import EngineUnavailable, InvalidRequest, Overloaded
from headrace.core.outputs import RequestTiming
from headrace.core.policy import Limits
from headrace.core.request import SLO, SamplingParams


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("n", 0), ("n", 129), ("n", True), ("temperature", -0.1), ("temperature", math.nan), ("top_p", 0.0),
        ("top_p", 1.01), ("top_k", -2), ("min_p", 1.5), ("repetition_penalty", 0.0), ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1), ("min_tokens", -1), ("max_tokens", 0), ("max_tokens", -5), ("logprobs", 21),
        ("seed", 1 << 63), ("temperature", "hot"), ("top_p", math.inf), ("n", 1.5), ("max_tokens", 5.0), ("top_k", 2.5),
        ("seed", 0.5), ("logprobs", 2.5), ("min_tokens", 1.5), ("max_tokens", "5"),
    ],
)  # fmt: skip
def test_values_out_of_range_name_their_field(field: str, bad: object) -> None:
    with pytest.raises(InvalidRequest, match=field) as caught:
        SamplingParams(**{field: bad})
    assert caught.value.field == field
    assert repr(bad) in caught.value.message


def test_fields_that_contradict_each_other() -> None:
    with pytest.raises(InvalidRequest, match="above max_tokens"):
        SamplingParams(min_tokens=5, max_tokens=4)
    with pytest.raises(InvalidRequest, match="empty string"):
        SamplingParams(stop=["a", ""])
    with pytest.raises(InvalidRequest, match="301 entries"):
        SamplingParams(logit_bias=dict.fromkeys(range(301), 1.0))
    with pytest.raises(InvalidRequest, match=r"logit_bias\[3\]"):
        SamplingParams(logit_bias={3: 101.0})


@pytest.mark.parametrize(
    ("field", "bad"),
    [("stop", ["a", 5]), ("stop_token_ids", ["x"]), ("stop_token_ids", [1.0]), ("logit_bias", {"5": 1.0})],
)
def test_entries_of_the_wrong_type_name_their_field(field: str, bad: object) -> None:
    with pytest.raises(InvalidRequest, match=field) as caught:
        SamplingParams(**{field: bad})
    assert caught.value.field == field


def test_numbers_of_numpy_are_numbers() -> None:
    params = SamplingParams(n=np.int64(2), temperature=np.float32(0.5), stop_token_ids=np.array([3]).tolist())
    assert params.n == 2


def test_a_number_beyond_every_float_is_out_of_range() -> None:
    with pytest.raises(InvalidRequest, match="seed"):
        SamplingParams(seed=10**400)


@pytest.mark.parametrize("bad", [0, -1.0, math.nan, math.inf])
def test_memory_for_k_and_v_is_a_finite_number_above_zero(bad: float) -> None:
    with pytest.raises(InvalidRequest, match="kv_gib"):
        EngineConfig(kv_gib=bad)


def test_a_single_stop_string_is_one_string() -> None:
    assert SamplingParams(stop="END").stop == ("END",)


@pytest.mark.parametrize("bad", [0, -1, math.inf, math.nan])
def test_latency_targets_are_above_zero(bad: float) -> None:
    with pytest.raises(InvalidRequest, match=r"slo\.tpot_ms"):
        SLO(tpot_ms=bad)
    with pytest.raises(InvalidRequest, match=r"slo\.ttft_ms"):
        SLO(ttft_ms=bad)


def test_timing_leaves_the_first_token_out() -> None:
    timing = RequestTiming(arrival=1.0, first_token=1.5, last_token=2.5, decoded=11)
    assert timing.ttft_ms == pytest.approx(500)
    assert timing.tpot_ms == pytest.approx(100)
    assert RequestTiming(arrival=1.0, first_token=1.5, last_token=1.5, decoded=1).tpot_ms is None


def test_errors_survive_the_process_boundary() -> None:
    error = pickle.loads(pickle.dumps(EngineUnavailable("gone", field="x", code="engine_crashed")))
    assert (type(error), error.message, error.field, error.code, error.status) == (
        EngineUnavailable, "gone", "x", "engine_crashed", 503,
    )  # fmt: skip
    full = pickle.loads(pickle.dumps(Overloaded("full", retry_after_s=7.0)))
    assert full.retry_after_s == 7.0


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"kv_gib": 0}, "kv_gib"),
        ({"max_context": -1}, "max_context"),
        ({"threads": 0}, "threads"),
        ({"max_queue": 0}, "max_queue"),
        ({"limits": Limits(max_sequences=0)}, "max_sequences"),
        ({"limits": Limits(max_sequences=10, max_step_tokens=9)}, "max_sequences"),
    ],
)
def test_configuration_is_checked(options: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        EngineConfig(**options)  # type: ignore[arg-type]
    assert caught.value.field == field


def test_a_virtual_clock_moves_only_forward() -> None:
    clock = VirtualClock(5.0)
    clock.advance(0.5)
    assert clock.now() == 5.5
    with pytest.raises(ValueError, match="backwards"):
        clock.advance(-1)


@pytest.mark.parametrize(
    ("slo", "ttft", "tpot", "met"),
    [
        (SLO(), 10.0, 10.0, None),
        (SLO(ttft_ms=10), 10.0, None, True),
        (SLO(ttft_ms=10), 10.1, None, False),
        (SLO(tpot_ms=10), 99.0, 10.0, True),
        (SLO(tpot_ms=10), 1.0, 10.1, False),
        (SLO(tpot_ms=10), 1.0, None, True),
        (SLO(ttft_ms=10, tpot_ms=10), 1.0, 11.0, False),
        (SLO(ttft_ms=10, tpot_ms=10), 11.0, 1.0, False),
        (SLO(tpot_ms=10), None, None, False),
    ],
)
def test_when_targets_are_met(slo: SLO, ttft: float | None, tpot: float | None, met: bool | None) -> None:
    assert slo.met_by(ttft, tpot) is met
