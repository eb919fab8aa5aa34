"""Slots from memory: exact bytes, shares, and errors with numbers that work when followed."""

from __future__ import annotations

import re

import pytest
import torch
from tests import tiny

from headrace.core.errors import InvalidRequest, OutOfMemory
from headrace.models import budget
from headrace.models.cache.slots import SlotPool
from headrace.models.runner import ModelRunner

GIB = 1 << 30


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_slot_bytes_are_what_the_planes_take(family: str) -> None:
    model, pool = tiny.loaded(family), SlotPool(10)
    ModelRunner(model, pool, "reference")
    taken = sum(plane.numel() * plane.element_size() for plane in pool.planes.values())
    assert budget.slot_bytes(model) * 10 == taken


def test_half_precision_halves_it() -> None:
    model = tiny.loaded("llama")
    full = budget.slot_bytes(model)
    model.dtype = torch.bfloat16
    assert budget.slot_bytes(model) * 2 == full == 2 * 3 * 2 * 16 * 4


def test_given_gib_are_used_whole() -> None:
    model = tiny.loaded("llama")
    assert budget.kv_slots(model, 0.01, 512) == int(0.01 * GIB) // budget.slot_bytes(model)


def test_too_little_names_numbers_that_are_enough() -> None:
    model = tiny.loaded("llama")
    with pytest.raises(InvalidRequest, match=r"kv_gib is 0.0001.*sequence of 512") as caught:
        budget.kv_slots(model, 0.0001, 512)
    assert caught.value.field == "kv_gib"
    found = re.search(r"at least (\S+) GiB", caught.value.message)
    assert found is not None
    assert budget.kv_slots(model, float(found[1]), 512) >= 512


@pytest.mark.parametrize("length", [1, 7, 129, 1000, 4097])
def test_suggested_gib_are_enough_for_any_length(length: int) -> None:
    model = tiny.loaded("llama")
    needed = budget.slot_bytes(model) * length / GIB
    assert needed <= float(budget._up(needed)) <= needed * 1.02


def test_more_than_there_is_names_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "_free_bytes", lambda _: 2 * GIB)
    with pytest.raises(InvalidRequest, match=r"kv_gib is 3, but 2.00 GiB are free"):
        budget.kv_slots(tiny.loaded("llama"), 3, 512)


@pytest.mark.parametrize(
    ("device", "free", "expected"),
    [("cpu", 8 * GIB, 2 * GIB), ("cpu", 400 * GIB, 4 * GIB), ("cuda", 100 * GIB, 85 * GIB)],
)
def test_default_share(device: str, free: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "_free_bytes", lambda _: free)
    model = tiny.loaded("llama")
    model.device = torch.device(device)
    assert budget.kv_slots(model, None, 512) == expected // budget.slot_bytes(model)


def test_default_holds_at_least_one_context(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.loaded("llama")
    monkeypatch.setattr(budget, "_free_bytes", lambda _: 600 * budget.slot_bytes(model))
    assert budget.kv_slots(model, None, 512) == 512
    with pytest.raises(InvalidRequest, match="at most 600") as caught:
        budget.kv_slots(model, None, 601)
    assert caught.value.field == "max_context"


def test_free_memory_of_this_machine_is_plausible() -> None:
    assert 1 << 24 < budget._free_bytes(torch.device("cpu")) < 1 << 50


@pytest.mark.parametrize(
    ("dtype", "says"),
    [(torch.float32, r"4.0 GiB.*float32.*3.0 GiB.*dtype bfloat16"), (torch.bfloat16, "use a smaller model$")],
)
def test_weights_that_do_not_fit(dtype: torch.dtype, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "_free_bytes", lambda _: 3 * GIB)
    cpu = torch.device("cpu")
    budget.check_weights("big", 3 * GIB // dtype.itemsize, dtype, cpu)
    with pytest.raises(OutOfMemory, match=says):
        budget.check_weights("big", 4 * GIB // dtype.itemsize, dtype, cpu)
