"""headrace itself, driven through its public Python interface like any other engine."""

from __future__ import annotations

from typing import Any

import loop

OPTIONS: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": "float32"},
    "bf16": {"dtype": "bfloat16"},
    "int8": {"dtype": "float32", "quantize": "int8"},
    "int4": {"dtype": "float32", "quantize": "nf4"},
}


class Headrace(loop.Engine):
    """One :class:`headrace.LLM` without prefix reuse."""

    def load(self, model: str, precision: str, threads: int, sequences: int, context: int) -> dict[str, Any]:
        from headrace import LLM

        self._llm = LLM(
            model,
            **OPTIONS[precision],
            threads=threads,
            max_context=context,
            max_sequences=sequences,
            max_step_tokens=max(1024, sequences),
            kv_gib=0.5,
            prefix_cache=False,
        )
        return {"ran": " ".join(str(value) for value in OPTIONS[precision].values())}

    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        from headrace import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def close(self) -> None:
        self._llm.close()


if __name__ == "__main__":
    loop.run(Headrace())
