"""Commands whose options come in groups: a dataclass for each, in place of a parameter for every option."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints


def flat(command: Callable[..., None]) -> Callable[..., None]:
    """``command`` as typer wants it, with every field of its dataclass parameters as a parameter of its own.

    A field's annotation and default become the option's. Two groups must not have a field of the same name.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {}
    flattened: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        kind = hints[parameter.name]
        if is_dataclass(kind):
            groups[parameter.name] = kind
            flattened += _parameters(kind)
        else:
            flattened.append(parameter.replace(annotation=kind))

    def run(**options: Any) -> None:
        built = {name: kind(**{f.name: options.pop(f.name) for f in fields(kind)}) for name, kind in groups.items()}
        command(**options, **built)

    functools.update_wrapper(run, command)
    del run.__wrapped__  # type: ignore[attr-defined]  # whoever asks for the signature shall see the flat one
    run.__signature__ = inspect.Signature(flattened)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in flattened}
    return run


def _parameters(kind: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(kind, include_extras=True)
    return [
        inspect.Parameter(f.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=f.default, annotation=hints[f.name])
        for f in fields(kind)
    ]
