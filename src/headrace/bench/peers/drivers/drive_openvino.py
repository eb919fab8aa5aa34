"""OpenVINO GenAI: paged attention, prefix reuse off. Checkpoints are converted by optimum-intel.

On processors with bfloat16 units OpenVINO would compute a float32 model in bfloat16 unless told not to.
"""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import loop

WEIGHTS = {"fp32": ("fp32",), "int8": ("int8",), "int4": ("int4", "--sym", "--group-size", "64", "--ratio", "1.0")}


class OpenVino(loop.OpenLoopEngine):
    """A continuous-batching pipeline of OpenVINO GenAI on the CPU."""

    def prepare(self, checkpoint: str, out: str, precision: str) -> None:
        subprocess.run(
            [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "openvino", "--model", checkpoint,
             "--task", "text-generation-with-past", "--weight-format", *WEIGHTS[precision], out],
            check=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def load(self, model: str, precision: str, threads: int, sequences: int, context: int) -> dict[str, Any]:
        import openvino
        import openvino_genai as genai

        scheduler = genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.cache_size = 1
        scheduler.max_num_batched_tokens = 1024
        scheduler.max_num_seqs = sequences
        settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads}
        hint = "its own choice"
        if precision == "fp32":
            hint = settings["INFERENCE_PRECISION_HINT"] = "f32"
        else:
            chosen = openvino.Core().get_property("CPU", "INFERENCE_PRECISION_HINT")
            hint = getattr(chosen, "to_string", lambda: str(chosen))()
        self._pipeline = genai.ContinuousBatchingPipeline(model, scheduler, "CPU", settings)
        self._count = 0
        return {"ran": f"{precision} weights, inference precision {hint}"}

    def _settings(self, new: int) -> Any:
        import openvino_genai as genai

        config = genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = new
        config.ignore_eos, config.do_sample = True, False
        return config

    def _add(self, prompt: list[int], new: int) -> Any:
        import numpy as np
        import openvino

        self._count += 1
        return self._pipeline.add_request(
            self._count, openvino.Tensor(np.array([prompt], np.int64)), self._settings(new)
        )

    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        handles = [self._add(prompt, new) for prompt in prompts]
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        return [list(handle.read_all()[0].generated_ids) for handle in handles]

    def replay(self, requests: list[dict[str, Any]], cutoff_s: float) -> list[dict[str, Any]]:
        waiting = sorted(requests, key=lambda request: request["at_s"])
        rows = {request["id"]: {"id": request["id"], "at_s": request["at_s"], "tokens": 0} for request in requests}
        running: dict[str, tuple[Any, int]] = {}
        started = time.perf_counter()
        while (waiting or running) and (now := time.perf_counter() - started) < cutoff_s:
            while waiting and waiting[0]["at_s"] <= now:
                request = waiting.pop(0)
                running[request["id"]] = self._add(request["prompt"], request["new"]), request["new"]
            if not running:
                time.sleep(min(0.05, max(0.0, waiting[0]["at_s"] - now)))
                continue
            self._pipeline.step()
            now = time.perf_counter() - started
            for name, (handle, new) in list(running.items()):
                row = rows[name]
                while handle.can_read():
                    row["tokens"] += sum(len(output.generated_ids) for output in handle.read().values())
                if row["tokens"]:
                    row.setdefault("first_s", now)
                if row["tokens"] >= new:
                    row["end_s"] = now
                    del running[name]
        for handle, _ in running.values():
            handle.cancel()
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        return list(rows.values())


if __name__ == "__main__":
    loop.run(OpenVino())
