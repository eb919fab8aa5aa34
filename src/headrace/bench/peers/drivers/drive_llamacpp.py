"""llama.cpp through the C interface that llama-cpp-python wraps: greedy decoding of several sequences in one batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf_writer
import loop

KINDS = {"fp32": "f32", "fp16": "f16", "int8": "q8_0", "int4": "q4_0"}


def _has_tiles() -> bool:
    """Whether this is an x86 with AMX, where the tile kernels of version 0.3.36 were seen to end in an illegal instruction."""
    try:
        return " amx_int8 " in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


class LlamaCpp(loop.Engine):
    """One context for batches of each size, made on first use."""

    def prepare(self, checkpoint: str, out: str, precision: str) -> None:
        gguf_writer.write(Path(checkpoint), Path(out) / "model.gguf", KINDS[precision])

    def load(self, model: str, precision: str, threads: int, sequences: int, context: int) -> dict[str, Any]:
        import llama_cpp

        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        params.use_extra_bufts = not _has_tiles()
        self._model = llama_cpp.llama_model_load_from_file(str(Path(model) / "model.gguf").encode(), params)
        if not self._model:
            raise RuntimeError("llama.cpp cannot load the converted model")
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._width = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self._threads, self._length = threads, context
        self._contexts: dict[int, Any] = {}
        packed = "packed" if params.use_extra_bufts else "not packed"
        return {"ran": f"{KINDS[precision]} weights, {packed}"}

    def _context(self, sequences: int) -> Any:
        import llama_cpp

        if sequences not in self._contexts:
            params = llama_cpp.llama_context_default_params()
            params.n_ctx = params.n_batch = self._length * sequences
            params.n_ubatch = 512
            params.n_seq_max = sequences
            params.n_threads = params.n_threads_batch = self._threads
            made = llama_cpp.llama_init_from_model(self._model, params)
            self._contexts[sequences] = made, llama_cpp.llama_batch_init(self._length * sequences, 0, 1)
        return self._contexts[sequences]

    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        import llama_cpp
        import numpy as np

        context, batch = self._context(len(prompts))
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)

        def decode(rows: list[tuple[int, int, int, bool]]) -> list[int]:
            for place, (token, position, sequence, wanted) in enumerate(rows):
                batch.token[place], batch.pos[place] = token, position
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, sequence
                batch.logits[place] = wanted
            batch.n_tokens = len(rows)
            code = llama_cpp.llama_decode(context, batch)
            if code != 0:
                raise RuntimeError(f"llama_decode returned {code}")
            pointers = [llama_cpp.llama_get_logits_ith(context, i) for i, row in enumerate(rows) if row[3]]
            return [int(np.ctypeslib.as_array(pointer, shape=(self._width,)).argmax()) for pointer in pointers]

        last = len(prompts[0]) - 1
        made = [decode([(t, p, s, p == last) for s, prompt in enumerate(prompts) for p, t in enumerate(prompt)])]
        while len(made) < new:
            made.append(decode([(token, last + len(made), s, True) for s, token in enumerate(made[-1])]))
        return [list(tokens) for tokens in zip(*made, strict=True)]


if __name__ == "__main__":
    loop.run(LlamaCpp())
