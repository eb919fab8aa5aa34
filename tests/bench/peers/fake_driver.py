"""A driver that behaves as its first argument says: well, or in one of the ways in which engines go wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, sys.argv[2])  # where the real drivers find the loop beside them

import loop


class Fake(loop.Engine):
    """Counts up from the prompt's last token."""

    def __init__(self, behaviour: str) -> None:
        self._behaviour = behaviour

    def prepare(self, checkpoint: str, out: str, precision: str) -> None:
        (Path(out) / "converted.json").write_text(json.dumps([checkpoint, precision]))
        if self._behaviour == "cannot convert":
            raise RuntimeError("no such layer")

    def load(self, model: str, precision: str, threads: int, sequences: int, context: int) -> dict[str, object]:
        if self._behaviour == "slow start":
            time.sleep(60)
        if self._behaviour == "leaves children":
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            return {"ran": str(child.pid)}
        print("a library prints to standard output")
        return {"ran": "fake " + precision, "model": model}

    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        if self._behaviour == "hang":
            time.sleep(600)
        if self._behaviour == "crash":
            print("out of cheese", file=sys.stderr)
            sys.stderr.flush()
            os._exit(7)
        if self._behaviour == "raise":
            raise ValueError("prompt too long")
        made = [[prompt[-1] + 1 + i for i in range(new)] for prompt in prompts]
        return made[:-1] if self._behaviour == "short" else made


if __name__ == "__main__":
    if sys.argv[1] == "garbage":
        for _ in sys.stdin:
            print("Segmentation fault, or so", flush=True)
    loop.run(Fake(sys.argv[1]))
