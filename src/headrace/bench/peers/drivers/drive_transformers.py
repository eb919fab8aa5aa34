"""transformers: ``generate`` (dynamic cache, SDPA), or with the argument ``cb`` its continuous batching (one warm manager)."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Any

import loop

TYPES = {"fp32": "float32", "bf16": "bfloat16"}
DRAIN_S = 1.0


def load_module(model: str, precision: str, threads: int) -> Any:
    """The model in evaluation mode, with no token that ends a text."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    dtype = getattr(torch, TYPES[precision])
    module = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="sdpa").eval()
    module.generation_config.eos_token_id = None
    return module


class Generate(loop.Engine):
    """``model.generate`` on one padded batch."""

    def load(self, model: str, precision: str, threads: int, sequences: int, context: int) -> dict[str, Any]:
        self._module = load_module(model, precision, threads)
        return {"ran": TYPES[precision]}

    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        import torch

        ids = torch.tensor(prompts)
        made = self._module.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )
        return made[:, ids.shape[1] :].tolist()


class ContinuousBatching(loop.OpenLoopEngine):
    """The manager behind ``generate_batch``, kept warm: started for one call it costs seconds."""

    _replays = 0

    def load(self, model: str, precision: str, threads: int, sequences: int, context: int) -> dict[str, Any]:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        module = load_module(model, precision, threads)
        page = 256
        config = ContinuousBatchingConfig(
            page_size=page,
            num_blocks=(sequences + 1) * -(-context // page),
            max_batch_tokens=1024,
            allow_block_sharing=False,
            max_requests_per_batch=sequences,
        )
        generation = GenerationConfig(max_new_tokens=context, do_sample=False, eos_token_id=-1, pad_token_id=0)
        self._stack = contextlib.ExitStack()
        self._manager = self._stack.enter_context(
            module.continuous_batching_context_manager(
                generation_config=generation, continuous_batching_config=config, block=True, timeout=5
            )
        )
        return {"ran": TYPES[precision]}

    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        ids = [self._manager.add_request(prompt, max_new_tokens=new) for prompt in prompts]
        done: dict[str, list[int]] = {}
        while len(done) < len(ids):
            output = self._manager.get_result(timeout=60)
            if output is not None and output.is_finished():
                done[output.request_id] = list(output.generated_tokens)
        return [done[request_id] for request_id in ids]

    def replay(self, requests: list[dict[str, Any]], cutoff_s: float) -> list[dict[str, Any]]:
        waiting = sorted(requests, key=lambda request: request["at_s"])
        # Names of their own in every replay: the last words of a cancelled request may still be on their way.
        self._replays += 1
        names = {f"{self._replays}-{request['id']}": request["id"] for request in requests}
        rows = {request["id"]: {"id": request["id"], "at_s": request["at_s"], "tokens": 0} for request in requests}
        started, open_ = time.perf_counter(), set(names)
        while open_ and (now := time.perf_counter() - started) < cutoff_s:
            while waiting and waiting[0]["at_s"] <= now:
                request = waiting.pop(0)
                self._manager.add_request(
                    request["prompt"],
                    request_id=f"{self._replays}-{request['id']}",
                    max_new_tokens=request["new"],
                    streaming=True,
                )
            due = waiting[0]["at_s"] - now if waiting else 0.05
            output = self._manager.get_result(timeout=min(0.05, max(0.001, due)))
            if output is None or output.request_id not in open_:
                continue
            now = time.perf_counter() - started
            row = rows[names[output.request_id]]
            row.setdefault("first_s", now)
            row["tokens"] = len(output.generated_tokens)
            if output.is_finished():
                row["end_s"] = now
                open_.discard(output.request_id)
        self._cancel(open_)
        return list(rows.values())

    def _cancel(self, names: set[str]) -> None:
        """Cancel requests and take in what is still said of them."""
        for name in names:
            self._manager.cancel_request(name)
        silent_at = time.perf_counter() + DRAIN_S
        while names and time.perf_counter() < silent_at:
            self._manager.get_result(timeout=0.1)

    def close(self) -> None:
        self._stack.close()


if __name__ == "__main__":
    loop.run(ContinuousBatching() if sys.argv[1:] == ["cb"] else Generate())
