"""JSON schemas that can be enforced token by token.

The grammar compiler ignores what it cannot express and, of several constraints on one value, often honours only one. Here
a schema is rewritten into an equal or narrower one that is honoured whole (every answer of the result is valid under
the original), and what has no such form is refused by name. Objects are limited to declared properties unless
``additionalProperties`` says otherwise.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from headrace.core.errors import InvalidRequest

MAX_DEPTH = 32

_TYPED = {
    "object": (
        "properties", "required", "additionalProperties", "patternProperties", "propertyNames", "minProperties", "maxProperties",
    ),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "string": ("pattern", "format", "minLength", "maxLength"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}  # fmt: skip
_TYPED["integer"] = _TYPED["number"]
_TYPES = (*_TYPED, "boolean", "null")
_COMBINATORS = ("$ref", "const", "enum", "anyOf", "oneOf", "allOf")
_CONSTRAINTS = ("type", *_COMBINATORS, *(word for words in _TYPED.values() for word in words))
_REFUSED = (
    "not", "if", "then", "else", "contains", "minContains", "maxContains", "dependentRequired", "dependentSchemas", "dependencies",
    "uniqueItems", "unevaluatedItems", "$dynamicRef", "$recursiveRef", "additionalItems",
)  # fmt: skip
_DEFINITIONS = ("$defs", "definitions")


def parse(spec: str, field: str) -> Any:
    """The schema behind its text, rewritten by :func:`enforceable`.

    Raises:
        InvalidRequest: not JSON, not a schema, or not enforceable; the message names the place as a JSON pointer.
    """
    try:
        schema = json.loads(spec, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{field}: the schema is not JSON ({error}): send a JSON object", field=field) from None
    if not isinstance(schema, Mapping | bool):
        raise InvalidRequest(
            f"{field}: the schema is {type(schema).__name__}: a JSON schema is an object or true", field=field
        )
    return enforceable(schema, field)


def enforceable(schema: Any, field: str) -> Any:
    """``schema`` in a form the grammar compiler honours whole; raises :class:`InvalidRequest` where there is none."""
    try:
        return _Rewriter(schema, field).visit(schema, "#", 0)
    except (TypeError, ValueError, AttributeError, KeyError) as error:  # a keyword's value of the wrong shape
        raise InvalidRequest(f"{field}: the schema is malformed ({error}): correct it", field=field) from error


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


class _Rewriter:
    def __init__(self, root: Any, field: str) -> None:
        self._root, self._field = root, field

    def _refuse(self, place: str, problem: str) -> InvalidRequest:
        return InvalidRequest(f"{self._field}: the schema at {place} {problem}", field=self._field)

    def visit(self, schema: Any, place: str, depth: int) -> Any:
        """The rewritten schema."""
        if depth > MAX_DEPTH:
            raise self._refuse(place, f"is nested more than {MAX_DEPTH} deep: use $defs and $ref")
        if schema is True:
            return {}
        if not isinstance(schema, Mapping):
            raise self._refuse(place, f"is {json.dumps(schema)}: nothing could ever match; give an object or true")
        for word in _REFUSED:
            if schema.get(word, False) is not False:
                raise self._refuse(
                    place,
                    f'uses "{word}", which cannot be enforced while generating: remove it and check the answer yourself',
                )
        definitions = {
            word: {
                name: self.visit(entry, f"{place}/{word}/{name}", depth + 1)
                for name, entry in dict(schema[word]).items()
            }
            for word in _DEFINITIONS
            if isinstance(schema.get(word), Mapping)
        }
        live = {word: schema[word] for word in _CONSTRAINTS if word in schema}
        if schema.get("unevaluatedProperties", True) is not True:
            if schema["unevaluatedProperties"] is not False:
                raise self._refuse(place, 'has a schema for "unevaluatedProperties": use "additionalProperties"')
            live.setdefault("additionalProperties", False)
        return {**definitions, **self._value(live, place, depth)}

    def _value(self, live: dict[str, Any], place: str, depth: int) -> dict[str, Any]:
        used = [word for word in _COMBINATORS if word in live]
        if len(used) > 1:
            raise self._refuse(
                place, f"combines {' and '.join(used)}: only one of them can be enforced; merge them into one"
            )
        if used:
            rewrite: Callable[[dict[str, Any], str, int], dict[str, Any]]
            rewrite = getattr(self, f"_{used[0].strip('$').lower()}")
            return rewrite(live, place, depth)
        return self._typed(live, place, depth)

    def _alone(self, live: Mapping[str, Any], word: str, place: str, allowed: tuple[str, ...] = ()) -> None:
        extra = [other for other in live if other != word and other not in allowed]
        if extra:
            raise self._refuse(
                place, f'has "{extra[0]}" beside "{word}": only one of them can be enforced; merge them into one'
            )

    def _ref(self, live: dict[str, Any], place: str, _depth: int) -> dict[str, Any]:
        self._alone(live, "$ref", place)
        seen = set()
        target: Any = live
        while isinstance(target, Mapping) and "$ref" in target:
            pointer = target["$ref"]
            if pointer in seen:
                raise self._refuse(place, f"refers to itself through {pointer} without end: break the circle")
            seen.add(pointer)
            target = self.resolve(pointer, place)
        return {"$ref": live["$ref"]}

    def resolve(self, pointer: Any, place: str) -> Any:
        """The schema a local reference names."""
        if not isinstance(pointer, str) or not (pointer == "#" or pointer.startswith("#/")):
            raise self._refuse(
                place, f"refers to {pointer!r}: only references inside the schema (#/$defs/...) are followed"
            )
        found = self._root
        for step in pointer.split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            if not isinstance(found, Mapping) or step not in found:
                raise self._refuse(place, f"refers to {pointer}, which does not exist")
            found = found[step]
        return found

    def _const(self, live: dict[str, Any], place: str, depth: int) -> dict[str, Any]:
        kept = self._enum(
            {**{k: v for k, v in live.items() if k != "const"}, "enum": [live["const"]]}, place, depth, "const"
        )
        return {"const": kept["enum"][0]}

    def _enum(self, live: dict[str, Any], place: str, _depth: int, word: str = "enum") -> dict[str, Any]:
        self._alone(live, "enum", place, ("type",))
        values = live["enum"]
        if not isinstance(values, list) or not values:
            raise self._refuse(place, "has an empty enum: list at least one value")
        kinds = self._kinds(live, place)
        kept = [value for value in values if not kinds or any(_is(value, kind) for kind in kinds)]
        if not kept:
            raise self._refuse(place, f"has no {word} value of type {live['type']}: nothing could ever match")
        return {"enum": kept}

    def _anyof(self, live: dict[str, Any], place: str, depth: int, word: str = "anyOf") -> dict[str, Any]:
        self._alone(live, word, place, ("type",))
        branches = live[word]
        if not isinstance(branches, list) or not branches:
            raise self._refuse(place, f"has an empty {word}: list at least one schema")
        if "type" in live:
            branches = [self._with_type(branch, live["type"], place, word) for branch in branches]
        return {"anyOf": [self.visit(b, f"{place}/{word}/{i}", depth + 1) for i, b in enumerate(branches)]}

    def _with_type(self, branch: Any, kind: Any, place: str, word: str) -> Any:
        if branch is True:
            return {"type": kind}
        if (
            isinstance(branch, Mapping)
            and branch.get("type", kind) == kind
            and not any(c in branch for c in _COMBINATORS)
        ):
            return {**branch, "type": kind}
        raise self._refuse(place, f'has "type" beside "{word}": write the type into each branch')

    def _oneof(self, live: dict[str, Any], place: str, depth: int) -> dict[str, Any]:
        made = self._anyof(live, place, depth, "oneOf")
        branches = live["oneOf"]
        for i, left in enumerate(branches):
            for right in branches[i + 1 :]:
                if not self._disjoint(left, right, place, 0):
                    raise self._refuse(
                        place,
                        "has oneOf branches that may match the same value, which cannot be enforced: use anyOf, or tell the branches "
                        "apart by type or by a required property with different const values",
                    )
        return made

    def _disjoint(self, left: Any, right: Any, place: str, depth: int) -> bool:
        """Whether no value can match both; False when in doubt."""
        left, right = self._followed(left, place), self._followed(right, place)
        if not isinstance(left, Mapping) or not isinstance(right, Mapping) or depth > MAX_DEPTH:
            return False
        values = [_listed(side) for side in (left, right)]
        if values[0] is not None and values[1] is not None:
            return not any(_equal(a, b) for a in values[0] for b in values[1])
        kinds = [_possible(side, value) for side, value in zip((left, right), values, strict=True)]
        if not kinds[0] & kinds[1]:
            return True
        if kinds[0] == kinds[1] == {"object"}:
            shared = set(left.get("required", ())) & set(right.get("required", ()))
            parts = [(left.get("properties", {}).get(name), right.get("properties", {}).get(name)) for name in shared]
            return any(self._disjoint(a, b, place, depth + 1) for a, b in parts)
        return False

    def _followed(self, schema: Any, place: str) -> Any:
        for _ in range(MAX_DEPTH):
            if not isinstance(schema, Mapping) or "$ref" not in schema:
                break
            schema = self.resolve(schema["$ref"], place)
        return schema

    def _allof(self, live: dict[str, Any], place: str, depth: int) -> dict[str, Any]:
        self._alone(live, "allOf", place)
        if not isinstance(live["allOf"], list) or len(live["allOf"]) != 1:
            raise self._refuse(place, "has an allOf of several schemas, which cannot be enforced: merge them into one")
        made: dict[str, Any] = self.visit(live["allOf"][0], f"{place}/allOf/0", depth + 1)
        return made

    def _kinds(self, live: Mapping[str, Any], place: str) -> list[str]:
        kinds = live.get("type", [])
        kinds = [kinds] if isinstance(kinds, str) else kinds
        if not isinstance(kinds, list) or not all(kind in _TYPES for kind in kinds):
            raise self._refuse(place, f"has type {json.dumps(live['type'])}: known types are {', '.join(_TYPES)}")
        return kinds

    def _typed(self, live: dict[str, Any], place: str, depth: int) -> dict[str, Any]:
        kinds = self._kinds(live, place)
        if not kinds:
            kinds = next(([kind] for kind, words in _TYPED.items() if any(word in live for word in words)), [])
        made: dict[str, Any] = {"type": kinds[0] if len(kinds) == 1 else kinds} if kinds else {}
        for kind in kinds:
            part = {word: live[word] for word in _TYPED.get(kind, ()) if word in live}
            if kind == "object":
                part = self._object(part, place, depth)
            elif kind == "array":
                part = self._array(part, place, depth)
            elif kind == "string":
                part = self._string(part, place)
            elif kind in ("number", "integer"):
                part = self._number(part, kind, place)
            made.update(part)
        return made

    def _object(self, part: dict[str, Any], place: str, depth: int) -> dict[str, Any]:
        declared = part.get("properties", {})
        required = part.get("required", [])
        if not isinstance(declared, Mapping) or not isinstance(required, list):
            raise self._refuse(place, 'has "properties" that is no object or "required" that is no list')
        rest = part.get("additionalProperties")
        open_names = [word for word in ("patternProperties", "propertyNames") if word in part]
        if open_names and (declared or required or len(open_names) > 1 or rest not in (None, True, False)):
            raise self._refuse(
                place, f'has "{open_names[0]}" beside other rules for properties: only one can be enforced'
            )
        counts = [word for word in ("minProperties", "maxProperties") if word in part]
        if counts and (not declared or rest not in (None, False)):
            raise self._refuse(place, f'has "{counts[0]}", which is enforced only for a closed list of properties')
        missing = [name for name in required if name not in declared]
        if missing and rest is False:
            raise self._refuse(place, f"requires {missing[0]!r}, which additionalProperties forbids: declare it")
        declared = {**declared, **dict.fromkeys(missing, True if rest is None else rest)}
        made = dict(part)
        if declared:
            made["properties"] = {
                name: self.visit(entry, f"{place}/properties/{name}", depth + 1) for name, entry in declared.items()
            }
        if rest not in (None, True, False):
            made["additionalProperties"] = self.visit(rest, f"{place}/additionalProperties", depth + 1)
        if "patternProperties" in part:
            for pattern in part["patternProperties"]:
                self._pattern(pattern, place)
            made["patternProperties"] = {
                name: self.visit(entry, f"{place}/patternProperties/{name}", depth + 1)
                for name, entry in part["patternProperties"].items()
            }
        if "propertyNames" in part:
            made["propertyNames"] = self.visit(
                {"type": "string", **part["propertyNames"]}, f"{place}/propertyNames", depth + 1
            )
        return made

    def _array(self, part: dict[str, Any], place: str, depth: int) -> dict[str, Any]:
        made = dict(part)
        items = part.get("items", True)
        if isinstance(items, list):
            made["prefixItems"], items = items, True
        if "prefixItems" in made:
            made["prefixItems"] = [
                self.visit(entry, f"{place}/prefixItems/{i}", depth + 1) for i, entry in enumerate(made["prefixItems"])
            ]
        made["items"] = False if items is False else self.visit(items, f"{place}/items", depth + 1)
        return made

    def _string(self, part: dict[str, Any], place: str) -> dict[str, Any]:
        made = dict(part)
        sized = "minLength" in part or "maxLength" in part
        if "pattern" in part:
            if sized:
                raise self._refuse(place, 'has a length beside "pattern": write the length into the pattern')
            self._pattern(part["pattern"], place)
        if sized or "pattern" in part:
            made.pop("format", None)  # an annotation by default; only one of them can be enforced
        return made

    def _pattern(self, pattern: Any, place: str) -> None:
        if not isinstance(pattern, str):
            raise self._refuse(place, f"has pattern {json.dumps(pattern)}: give a regular expression")
        if re.search(r"\(\?(?!:)|\\[bB0-9]", pattern):
            raise self._refuse(
                place, f"has pattern {pattern!r}: look-around, \\b and back-references cannot be enforced"
            )
        plain = re.sub(r"\[\^(?:\\.|[^\]\\])*\]", "", pattern)
        if re.search(r'"|\\\\|\\x(?:22|5c)|\\u00(?:22|5c)|\\u\{(?:22|5c)\}', plain, re.IGNORECASE):
            raise self._refuse(
                place, f"has pattern {pattern!r}: a literal quote or backslash cannot be enforced inside JSON"
            )

    def _number(self, part: dict[str, Any], kind: str, place: str) -> dict[str, Any]:
        if kind == "number" and "multipleOf" in part:
            raise self._refuse(place, 'has "multipleOf" for a number: it is enforced for integers only')
        for word, value in part.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise self._refuse(place, f"has {word} {json.dumps(value)}: give a number")
        return part


def _is(value: Any, kind: str) -> bool:
    """Whether a JSON value is of a JSON type."""
    if kind == "integer":
        return not isinstance(value, bool) and (
            isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        )
    if kind == "number":
        return not isinstance(value, bool) and isinstance(value, int | float)
    python: type | tuple[type, ...] = {
        "object": dict, "array": list, "string": str, "boolean": bool, "null": type(None),
    }[kind]  # fmt: skip
    return isinstance(value, python)


def _equal(left: Any, right: Any) -> bool:
    """JSON equality: 1 equals 1.0 but not true."""
    return isinstance(left, bool) == isinstance(right, bool) and bool(left == right)


def _listed(schema: Mapping[str, Any]) -> list[Any] | None:
    """The values a schema lists, or None."""
    if "const" in schema:
        return [schema["const"]]
    return schema["enum"] if isinstance(schema.get("enum"), list) else None


def _possible(schema: Mapping[str, Any], values: list[Any] | None) -> set[str]:
    """JSON types a schema may match ("number" covers integers)."""
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    if not kinds and values is not None:
        kinds = [kind for kind in _TYPES if any(_is(value, kind) for value in values)]
    found = {"number" if kind == "integer" else kind for kind in kinds}
    return found or set(_TYPES)
