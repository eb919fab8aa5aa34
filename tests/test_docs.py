"""What the documents promise: files and options they name exist, and their examples run."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.cli.program import Program

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(document: str, language: str) -> list[str]:
    """The code blocks of a document in one language."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", document.read_text())
    assert [link for link in links if not link.startswith("http") and not (document.parent / link).exists()] == []


def test_files_that_the_architecture_names_exist() -> None:
    named = set(re.findall(r"`([a-z]+/[\w/]+\.py)`", (ROOT / "docs/architecture.md").read_text()))
    assert len(named) > 30
    homes = (ROOT / "src/headrace", ROOT)
    assert [name for name in sorted(named) if not any((home / name).is_file() for home in homes)] == []


def test_options_that_the_documents_name_exist() -> None:
    named = set(re.findall(r"`(--[a-z-]+)", (ROOT / "docs/serving.md").read_text()))
    assert len(named) > 15
    help_text = subprocess.run(
        [sys.executable, "-m", "headrace", "serve", "--help"], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert [option for option in sorted(named) if option not in help_text] == []


def test_every_target_of_the_makefile_is_explained() -> None:
    text = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    assert phony is not None
    for target in phony[1].split():
        assert re.search(rf"^{target}:.*## \S", text, re.MULTILINE), target


@pytest.mark.parametrize("document", ["README.md", "docs/offline.md"])
def test_offline_examples_run(document: str) -> None:
    (example,) = [block for block in blocks(document, "python") if "LLM(" in block]
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 2


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of ``headrace serve`` with nothing said but the port."""
    program = Program()
    yield program.expect(r"ready: bundled at (\S+)")[1]
    program.stop()


def test_examples_with_the_openai_client_run(server: str) -> None:
    pytest.importorskip("openai")
    (setup,) = [block for block in blocks("README.md", "python") if "OpenAI(" in block]
    (structured,) = [block for block in blocks("docs/serving.md", "python") if "response_format" in block]
    check = (
        f"{setup}\nslo = answer.usage.model_extra['slo']\n"
        "assert slo['tpot_ms'] == 50 and slo['met'] in (True, False), slo\n"
        f"answer = {structured.strip()}\n"
        "import json\n"
        "if answer.choices[0].finish_reason != 'length':\n"
        "    assert set(json.loads(answer.choices[0].message.content)) == {'name', 'age'}\n"
        "print('checked')\n"
    ).replace("http://127.0.0.1:8000/v1", server)
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("checked\n")


def test_the_first_example_with_curl_streams(server: str) -> None:
    import httpx

    (example,) = [block for block in blocks("README.md", "sh") if "curl" in block]
    found = re.search(r"-d '(.*)'", example)
    assert found is not None
    headers = {"content-type": "application/json"}
    with httpx.stream("POST", f"{server}/chat/completions", content=found[1], headers=headers, timeout=240) as answer:
        lines = [line for line in answer.iter_lines() if line.startswith("data:")]
    assert answer.status_code == 200
    assert lines[-1] == "data: [DONE]"
    assert len(lines) > 2
