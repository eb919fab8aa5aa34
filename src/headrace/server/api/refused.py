"""Fields of other servers that we do not serve and that must not be ignored, because the answer would mean something else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from headrace.core.errors import InvalidRequest
from headrace.server.api.schemas import Body


def _given(value: Any) -> bool:
    return value is not None and value is not False and value != [] and value != {} and value != ""


def _beyond_one(value: Any) -> bool:
    return _given(value) and value != 1


def _beyond_text(value: Any) -> bool:
    return _given(value) and value != ["text"]


_TOOLS = "tools are not served by this version: leave it out, or ask for a JSON answer with response_format"
_REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "tools": (_given, _TOOLS),
    "functions": (_given, _TOOLS),
    "tool_choice": (lambda value: value not in (None, "none", "auto"), _TOOLS),
    "function_call": (lambda value: value not in (None, "none", "auto"), _TOOLS),
    "suffix": (_given, "filling in the middle is not served by this version: leave it out"),
    "best_of": (_beyond_one, "only the best of one is served: ask for several answers with n"),
    "use_beam_search": (_given, "beam search is not served: leave it out"),
    "prompt_logprobs": (_given, "log-probabilities of the prompt are not served: leave it out"),
    "prompt_embeds": (_given, "prompts are text or token ids: give prompt"),
    "modalities": (_beyond_text, 'only ["text"] is served'),
    "audio": (_given, "only text is served: leave it out"),
    "documents": (_given, "documents are not served: put them into the messages"),
}


def check(body: Body) -> None:
    """Raise :class:`InvalidRequest` naming the first field that would be ignored at the client's cost."""
    extra = body.model_extra or {}
    for name, (is_used, reason) in _REFUSED.items():
        if name in extra and is_used(extra[name]):
            raise InvalidRequest(f"{name}: {reason}", field=name, code="unsupported_parameter")
