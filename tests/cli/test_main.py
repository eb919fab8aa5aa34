from __future__ import annotations

import subprocess
import sys

import pytest

from headrace.core.errors import InvalidRequest

HEAVY = (
    "torch",
    "transformers",
    "numba",
    "fastapi",
    "uvicorn",
    "xgrammar",
    "httpx",
    "numpy",
    "huggingface_hub",
)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "headrace", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_help_names_every_command_and_imports_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "from headrace.cli import main\n"
        "sys.argv = ['headrace', *sys.argv[1:]]\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n"
        f"    print('IMPORTED', *[name for name in {HEAVY} if name in sys.modules])\n"
        "    sys.exit(end.code)\n"
    )
    for arguments in ([], ["serve"], ["chat"], ["generate"], ["models"], ["profile"], ["bench"]):
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments, "--help"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.rstrip().endswith("IMPORTED"), done.stdout[-200:]
        if not arguments:
            for command in ("serve", "chat", "generate", "models", "profile", "bench", "version"):
                assert f"│ {command} " in done.stdout


def test_version_names_what_it_runs_on() -> None:
    from headrace import __version__

    done = run("version")
    assert done.returncode == 0
    assert done.stdout.startswith(f"headrace {__version__}\n")
    assert "\ntorch " in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve", "--no-such-option"],
        ["nonsense"],
        ["generate"],
        ["generate", "x", "--temperature", "-1"],
        ["generate", "x", "--json-schema", "nowhere.json"],
        ["generate", "--file", "nowhere.txt"],
        ["generate", "x", "--model", "./nowhere"],
        ["models", "./nowhere"],
        ["models", "nobody/has-this"],
        ["chat", "--url", "localhost"],
        ["serve", "./nowhere"],
        ["serve", "--policy", "nonsense"],
        ["serve", "--kv-gib", "0"],
        ["serve", "--max-sequences", "9", "--max-step-tokens", "8"],
        ["serve", "--tier", "fast"],
        ["serve", "--slo-class", "chat:tpot=fast"],
        ["serve", "--slo-class", "chat:tpot=50ms", "--default-slo-class", "talk"],
        ["serve", "--slo-classes", "nowhere.yaml"],
        ["serve", "--service-tier", "priority=chat"],
        ["serve", "--log-level", "loud"],
        ["serve", "--api-key-file", "nowhere"],
        ["serve", "--port", "70000"],
        ["serve", "--drain-timeout", "-1"],
        ["serve", "--host", "no.such.host.invalid"],
    ],
    ids=" ".join,
)
def test_bad_input_is_status_2_and_no_traceback(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith(("headrace: ", "Usage: "))


def test_an_error_of_ours_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import headrace.cli

    def raising(*_: object, **__: object) -> None:
        raise InvalidRequest("this is wrong: do that", field="x")

    monkeypatch.setattr(headrace.cli, "app", raising)
    with pytest.raises(SystemExit) as end:
        headrace.cli.main()
    assert end.value.code == 2
    assert capsys.readouterr().err == "headrace: this is wrong: do that\n"


@pytest.mark.parametrize("command", ["serve", "generate"])
def test_defaults_of_engine_options_are_the_engines_own(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import inspect
    from dataclasses import asdict
    from importlib import import_module

    from headrace.core.config import EngineConfig
    from headrace.server import ServerSettings

    monkeypatch.delenv("HEADRACE_PROFILE", raising=False)
    config = asdict(EngineConfig())
    own = config | config["limits"] | {"drain_timeout": ServerSettings().drain_timeout_s}
    parameters = inspect.signature(getattr(import_module(f"headrace.cli.{command}"), command)).parameters
    shared = {name: p.default for name, p in parameters.items() if name in own}
    assert len(shared) >= 8
    assert shared == {name: own[name] for name in shared}
