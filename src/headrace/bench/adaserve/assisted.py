"""The peer: transformers' assisted generation with the same draft, a request at a time, beside its plain generation and beside ours."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from headrace.bench.adaserve.load import Texts
from headrace.bench.adaserve.pair import DRAFT, Bench
from headrace.core.request import SLO

SYSTEMS = ("transformers", "transformers assisted", "headrace chunked", "headrace adaserve")


def assisted_rows(
    bench: Bench, texts: Texts, folder: Path, count: int, report: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """Milliseconds a token of each system at batch 1, the systems in turn (kind "assisted"; a first prompt warms up).

    transformers runs the checkpoint in bfloat16, its best form on CPUs that multiply it; weights rounded to 8 bits are ours alone, so
    that what drafting gains is to be compared within a system, and times between systems with that in mind.
    """
    import torch
    import transformers

    from headrace.models.checkpoints.hub import resolve

    hub: Any = transformers
    report("loading the peer")
    target, draft = (
        hub.AutoModelForCausalLM.from_pretrained(place, dtype=torch.bfloat16).eval()
        for place in (folder, resolve(DRAFT))
    )
    for model in (target, draft):
        model.generation_config.eos_token_id = None

    def generate(prompt: tuple[int, ...], assistant: Any) -> float:
        ids = torch.tensor([prompt])
        settings = {"do_sample": False, "pad_token_id": 0, "assistant_model": assistant}
        times = []
        for new in (1, texts.answer):
            started = time.perf_counter()
            with torch.inference_mode():
                target.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, **settings
                )
            times.append(time.perf_counter() - started)
        return (times[1] - times[0]) / (texts.answer - 1) * 1e3

    def ours(policy: str, number: int) -> float:
        engine = bench.use(policy)
        request = texts.piece(1.0, 1, 1e6, seed=number, name=f"lone-{policy}-{number}", start=0.0)[0]
        engine.add(replace(request, arrival=0.0, slo=SLO()))
        found = 0.0
        while engine.busy:
            for delta in engine.step():
                if delta.reason is not None and delta.timing is not None:
                    found = delta.timing.tpot_ms or 0.0
        return found

    for number in range(count + 1):
        prompt = texts.piece(1.0, 1, 1e6, seed=number, name="prompt", start=0.0)[0].prompt
        report(f"transformers' assisted generation, prompt {number}")
        took = (generate(prompt, None), generate(prompt, draft), ours("chunked", number), ours("adaserve", number))
        if number:
            for system, ms in zip(SYSTEMS, took, strict=True):
                yield {"kind": "assisted", "system": system, "prompt": number, "tpot_ms": round(ms, 3)}
