"""Reads what a user may pass as prompts and parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any, TypeAlias, TypeVar

from headrace.core.errors import HeadraceError, InvalidRequest

Prompt: TypeAlias = str | Sequence[int] | Mapping[str, Any]
T = TypeVar("T")


def as_list(prompts: Any) -> list[Any]:
    """One prompt or many, as a list of prompts (a flat list of numbers is one prompt)."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    listed = list(prompts)
    return [listed] if listed and isinstance(listed[0], Integral) else listed


def text_and_ids(prompt: Any) -> tuple[str | None, list[int] | None]:
    """The text and the token ids of one prompt, at least one of which is there.

    Raises:
        InvalidRequest: it is none of: text, a sequence of ids, ``{"prompt": text}``, ``{"prompt_token_ids": ids}``.
    """
    if isinstance(prompt, Mapping):
        text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    elif isinstance(prompt, str):
        text, ids = prompt, None
    else:
        text, ids = None, prompt
    if ids is not None and not isinstance(ids, str):
        listed: list[Any] = list(ids) if hasattr(ids, "__iter__") else [None]
        if all(isinstance(i, Integral) and not isinstance(i, bool) for i in listed):
            return text, [int(i) for i in listed]
    elif isinstance(text, str):
        return text, None
    raise InvalidRequest(
        f"{prompt!r:.60} is no prompt: give text, a list of token ids, or a dict with 'prompt' or 'prompt_token_ids'",
        field="prompts",
    )


def per_prompt(given: T | Sequence[T] | None, default: T, count: int, name: str) -> list[T]:
    """One entry per prompt out of none, one for all, or one for each.

    Raises:
        InvalidRequest: a list of another length.
    """
    if given is None:
        return [default] * count
    if not isinstance(given, list | tuple):
        return [given] * count  # type: ignore[list-item]
    if len(given) != count:
        raise InvalidRequest(f"{name} has {len(given)} entries for {count} prompts: give one, or one each", field=name)
    return list(given)


@contextmanager
def naming(place: int, count: int) -> Iterator[None]:
    """Lets an error inside say which of ``count`` prompts it is about."""
    try:
        yield
    except HeadraceError as error:
        if count > 1:
            error.message = f"prompts[{place}]: {error.message}"
            error.args = (error.message,)
        raise
