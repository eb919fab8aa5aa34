"""Where the recorded traces are, for tests that want them: beside the repository, or beside the one its worktree belongs to."""

from __future__ import annotations

from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


def trace(name: str) -> Path:
    """The path of ``shared/data/serving/NAME``; skips the test when it is not there."""
    for root in (REPOSITORY.parent, REPOSITORY):
        path = root / "shared" / "data" / "serving" / name
        if path.exists():
            return path
    pytest.skip(f"the recorded trace {name} is not here (looked for ../shared/data/serving)")
