"""CTranslate2: its own converted folder, one batch at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import loop

# What the weights are stored as, and what it computes with.
STORED = {"fp32": "float32", "int8": "int8"}
COMPUTED = {"fp32": "float32", "int8": "int8_float32"}


class CTranslate2(loop.Engine):
    """A generator of CTranslate2."""

    def prepare(self, checkpoint: str, out: str, precision: str) -> None:
        from ctranslate2.converters import TransformersConverter

        TransformersConverter(checkpoint).convert(out, quantization=STORED[precision], force=True)

    def load(self, model: str, precision: str, threads: int, sequences: int, context: int) -> dict[str, Any]:
        import ctranslate2

        self._generator = ctranslate2.Generator(
            model, device="cpu", compute_type=COMPUTED[precision], inter_threads=1, intra_threads=threads
        )
        self._words = json.loads((Path(model) / "vocabulary.json").read_text(encoding="utf-8"))
        return {"ran": self._generator.compute_type}

    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        words = [[self._words[token] for token in prompt] for prompt in prompts]
        results = self._generator.generate_batch(
            words,
            max_length=new,
            min_length=new,
            sampling_topk=1,
            beam_size=1,
            include_prompt_in_result=False,
            end_token=[],
        )
        return [list(result.sequences_ids[0]) for result in results]


if __name__ == "__main__":
    loop.run(CTranslate2())
