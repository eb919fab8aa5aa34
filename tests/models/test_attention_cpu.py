"""The CPU backend against brute force, and what it promises about rows, threads and memory."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from headrace.core.batch import Packer
from headrace.models.attention.cpu import NumbaAttention
from tests.models.attention_cases import Case, brute_force, build, cases, worst

NUMBA = NumbaAttention()


@settings(max_examples=150, deadline=None)
@given(cases())
def test_equals_the_definition(case: Case) -> None:
    assert worst(case.run(NUMBA), brute_force(case)) < 2e-5
