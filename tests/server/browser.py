"""Headless Chromium for tests, where the machine has one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")


def executable(playwright: Any) -> str | None:
    """``HEADRACE_CHROMIUM``, playwright's own browser, or one on the path."""
    own = playwright.chromium.executable_path
    candidates = [os.environ.get("HEADRACE_CHROMIUM"), own, *map(shutil.which, NAMES)]
    return next((path for path in candidates if path and Path(path).exists()), None)


def launched() -> Iterator[Any]:
    """A browser; skips the test, saying why, when there is none."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        path = executable(playwright)
        if path is None:
            pytest.skip("no Chromium: run `playwright install chromium`, or name one with HEADRACE_CHROMIUM")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()
