"""The Triton backend under Triton's interpreter, which must be asked for before triton is first imported: in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("file", ["test_attention_gpu.py", "test_graphs_gpu.py"])
def test_the_gpu_matrix_under_the_interpreter(file: str) -> None:
    """Every test of the file, on CPU tensors."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/models/{file}"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "skipped" not in done.stdout
