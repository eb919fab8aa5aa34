"""Scheduling policies, functions of the engine's view, and the registry of policies by name."""

from __future__ import annotations

from collections.abc import Callable

from headrace.core.errors import InvalidRequest
from headrace.core.policy import Policy
from headrace.engine.policies.chunked import Chunked
from headrace.engine.policies.mlfq import Mlfq
from headrace.engine.policies.prefill_first import PrefillFirst
from headrace.engine.policies.priority import Priority
from headrace.engine.policies.vtc import Vtc

POLICIES: dict[str, Callable[[], Policy]] = {
    "chunked": Chunked,
    "prefill-first": PrefillFirst,
    "priority": Priority,
    "mlfq": Mlfq,
    "vtc": Vtc,
}


def get_policy(name: str) -> Policy:
    """A new instance of the policy called ``name``; raises :class:`InvalidRequest` naming the choices."""
    if name not in POLICIES:
        raise InvalidRequest(f"policy is {name!r}: choose one of {', '.join(sorted(POLICIES))}", field="policy")
    return POLICIES[name]()
