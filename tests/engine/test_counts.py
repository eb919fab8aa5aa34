"""What the engine counts of its own work: every token of a step under its purpose, and what became of drafts."""

from __future__ import annotations

import asyncio

from tests.engine.fake import engine, request
from tests.engine.process.test_service import serve
from tests.engine.test_engine import run
from tests.engine.test_speculation import speculating

from headrace.core.outputs import EngineStats
from headrace.engine.process.service import ProcessService
from headrace.speculation.policies import POLICIES


def in_all(stats: EngineStats) -> tuple[float, float, float]:
    return stats.prefill_per_step.total, stats.decode_per_step.total, stats.verify_per_step.total


def test_tokens_of_steps_by_purpose() -> None:
    built = speculating(1.0, POLICIES["spec-4"]())
    built.add(request("a", [1, 2, 3], max_tokens=12, ignore_eos=True))  # 3, 1 + 4, 1 + 4 and the last one alone
    deltas = run(built)["a", 0]
    stats = built.stats()
    assert in_all(stats) == (3, 3, 8)
    assert sum(stats.prefill_per_step.counts) == stats.steps == 4
    assert (stats.drafted, stats.accepted) == (8, 8)
    assert stats.accepted_per_draft.counts[4] == 2
    assert [(d.steps, d.drafted, d.accepted) for d in deltas] == [(0, 0, 0), (1, 4, 4), (1, 4, 4), (1, 0, 0)]


def test_wrong_drafts_are_counted_as_verified_and_not_as_accepted() -> None:
    built = speculating(0.0, POLICIES["spec-4"]())
    built.add(request("a", [1, 2, 3], max_tokens=6, ignore_eos=True))
    deltas = run(built)["a", 0]
    stats = built.stats()
    assert stats.drafted == sum(d.drafted for d in deltas) == stats.verify_per_step.total > 0
    assert stats.accepted == sum(d.accepted for d in deltas) < stats.drafted
    assert sum(d.steps for d in deltas) == stats.verifications == 5


def test_who_is_still_in_the_prompt() -> None:
    built = engine(max_step_tokens=8)
    assert built.stats().step_limit == 8
    built.add(request("long", [1] * 20, max_tokens=2))
    built.add(request("short", [2, 3], max_tokens=20, ignore_eos=True))
    assert built.stats().prefilling == {}  # both wait
    built.step()
    first = built.stats().prefilling["long"]
    assert first <= built.clock.now()
    while built.busy and "long" in built.stats().prefilling:
        assert built.stats().prefilling["long"] == first
        built.step()
    run(built)
    assert built.stats().prefilling == {}


def test_the_service_uses_the_ids_of_its_clients() -> None:
    async def body() -> dict[str, float]:
        service = ProcessService(serve, (0.2,))
        await service.start()
        try:
            await service.ready(60)
            stream = service.submit(request("mine", [1] * 400, max_tokens=2))
            for _ in range(100):
                found = (await service.stats()).prefilling
                if found:
                    break
            await stream.aclose()
            return found
        finally:
            await service.close()

    assert list(asyncio.run(body())) == ["mine"]
