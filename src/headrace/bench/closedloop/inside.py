"""Our engine from inside, in a process of its own: what a step costs, how little is not the model, and the bundled pair.

``python -m headrace.bench.closedloop.inside CHECKPOINT THREADS full|quick`` prints the rows as JSON; :func:`inside_rows` runs that.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PATIENCE_S = 300.0


def inside_rows(
    checkpoint: Path, threads: int | None, *, quick: bool = False, report: Callable[[str], None] = lambda line: None
) -> list[dict[str, Any]]:
    """Rows of the kinds ``tree``, ``overhead``, ``kv`` and ``drafts``; ``lost`` where they cannot be had."""
    report("steps of our engine, and the bundled pair")
    pace = "quick" if quick else "full"
    command = [sys.executable, "-m", "headrace.bench.closedloop.inside", str(checkpoint), str(threads or 0), pace]
    environment = dict(os.environ) | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, env=environment)
    except subprocess.TimeoutExpired:
        return [_lost(f"gave no answer within {PATIENCE_S:.0f} s")]
    try:
        rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        words = done.stderr.strip().splitlines()
        return [_lost(f"status {done.returncode}: {words[-1] if words else 'no words'}")]
    return rows


def _lost(why: str) -> dict[str, Any]:
    return {"kind": "lost", "engine": "headrace", "precision": "fp32", "why": f"steps and bundled pair: {why}"}


def main(checkpoint: Path, threads: int, quick: bool) -> None:
    """Measure and print."""
    import torch

    from headrace.bench.closedloop import pair, steps
    from headrace.compose import default_threads

    torch.set_num_threads(threads or default_threads())
    rows = [*steps.overhead_rows(checkpoint, quick=quick), *steps.tree_rows(checkpoint, quick=quick)]
    rows += [*pair.kv_rows(quick=quick), *pair.draft_rows(quick=quick)]
    print(json.dumps(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "quick")
