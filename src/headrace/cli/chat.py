"""``headrace chat``: talk to any OpenAI-compatible server."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headrace.core.errors import HeadraceError

if TYPE_CHECKING:
    from rich.console import Console

    from headrace.cli.endpoint import ChatDelta, Endpoint

COMMANDS = {
    "/reset": "forget the conversation",
    "/system TEXT": "set the system prompt (nothing: remove it) and start anew",
    "/exit": "leave (so does Ctrl-D)",
    "/help": "this list",
}


def chat(
    url: Annotated[str, typer.Option(help="Address of the API.")] = "http://127.0.0.1:8000/v1",
    model: Annotated[str | None, typer.Option(help="Model to ask for; by default the first one served.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="Key, if the server wants one.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; the server's own by default.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus mass.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer, in tokens.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes answers repeatable.")] = None,
) -> None:
    """Chat with a model over several turns; Ctrl-C stops the answer, /help lists what else can be typed.

    Works against any server that speaks OpenAI's API. With a pipe as input, every line is a turn and only answers are printed.
    """
    from headrace.cli.endpoint import Endpoint

    options = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "seed": seed}
    endpoint = Endpoint(url, api_key)
    try:
        talk = Conversation(
            model or endpoint.first_model(), system, {name: v for name, v in options.items() if v is not None}
        )
        run(endpoint, talk, interactive=sys.stdin.isatty() and sys.stdout.isatty())
    finally:
        endpoint.close()


@dataclass(slots=True)
class Conversation:
    """The turns so far and what every request carries besides."""

    model: str
    system: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    turns: list[dict[str, str]] = field(default_factory=list)

    def payload(self, text: str) -> dict[str, Any]:
        """The request body that asks for the answer to ``text``; the conversation stays as it is."""
        opening = [{"role": "system", "content": self.system}] if self.system else []
        messages = [*opening, *self.turns, {"role": "user", "content": text}]
        return {"model": self.model, "messages": messages, **self.options}

    def add(self, text: str, answer: str) -> None:
        """Remember a turn."""
        self.turns += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]

    def obey(self, line: str) -> str | None:
        """Carry out a line that starts with a slash.

        Returns:
            What to tell the user, or None to leave.
        """
        word, _, rest = line.partition(" ")
        if word == "/exit":
            return None
        if word == "/reset":
            self.turns.clear()
            return "conversation forgotten"
        if word == "/system":
            self.system = rest.strip() or None
            self.turns.clear()
            return "system prompt set" if self.system else "system prompt removed"
        if word == "/help":
            return "\n".join(f"{name:14} {what}" for name, what in COMMANDS.items())
        return f"no command {word}; there are {', '.join(COMMANDS)}"


def run(endpoint: Endpoint, talk: Conversation, *, interactive: bool) -> None:
    """Read turns until the input ends. For a person, errors are shown and the talk goes on; in a pipe they end it."""
    from rich.console import Console

    console = Console(stderr=not interactive, highlight=False, markup=False)
    if interactive:
        console.print(f"{talk.model} at {endpoint.url}. /help lists commands, Ctrl-C stops an answer.", style="dim")
    for line in _lines(console, interactive):
        if line.startswith("/"):
            reply = talk.obey(line)
            if reply is None:
                return
            console.print(reply, style="dim")
            continue
        try:
            _turn(endpoint, talk, line, console, interactive)
        except HeadraceError as error:
            if not interactive:
                raise
            console.print(error.message, style="red")


def _lines(console: Console, interactive: bool) -> Iterator[str]:
    while True:
        try:
            line = console.input("[bold cyan]>[/] ", markup=True) if interactive else input()
        except EOFError:
            return
        if line.strip():
            yield line.strip()


def _turn(endpoint: Endpoint, talk: Conversation, text: str, console: Console, interactive: bool) -> None:
    """Ask, print the answer as it comes, and remember the turn; an answer stopped by Ctrl-C is remembered as far as it came."""
    parts: list[str] = []
    last: ChatDelta | None = None
    started, first = time.monotonic(), None
    events = endpoint.stream(talk.payload(text))
    try:
        for event in events:
            if event.text and first is None:
                first = time.monotonic()
            parts.append(event.text)
            sys.stdout.write(event.text)
            sys.stdout.flush()
            last = event
    except KeyboardInterrupt:
        if not interactive:
            raise
        console.print(" [stopped]", style="dim", end="")
    finally:
        events.close()  # type: ignore[attr-defined]
        sys.stdout.write("\n")
    talk.add(text, "".join(parts))
    if interactive and first is not None:
        console.print(_speed(first - started, time.monotonic() - first, last), style="dim")


def _speed(ttft_s: float, decode_s: float, last: ChatDelta | None) -> str:
    tokens = last.usage.get("completion_tokens", 0) if last else 0
    rate = f", {tokens} tokens at {(tokens - 1) / decode_s:.0f}/s" if tokens > 1 and decode_s > 0 else ""
    return f"first token after {ttft_s * 1e3:.0f} ms{rate}"
