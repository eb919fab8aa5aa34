"""Errors in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``, whatever went wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from headrace.core.errors import HeadraceError, Overloaded
from headrace.server.api.schemas import CLASS_TAG, TARGETS_TAG

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}
_CODES = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large", 415: "unsupported_media_type"}
_BODY_FIELDS = {"body", "query", "path", "header", TARGETS_TAG, CLASS_TAG}
_LONGEST_MESSAGE = 2000
_SEPARATORS = (("\x85", "\\u0085"), ("\u2028", "\\u2028"), ("\u2029", "\\u2029"))
"""Line ends to many a client's reader of events, though not to JSON."""


class HttpError(HeadraceError):
    """An error that only exists in HTTP (401, 408, 413, 415), with its own status and headers."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        field: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, field=field, code=code)
        self.status = status
        self.headers = dict(headers or {})


def error_body(status: int, message: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The JSON object of an error; long messages are cut and lone surrogates replaced."""
    clean = message.encode("utf-8", "replace").decode("utf-8")
    if len(clean) > _LONGEST_MESSAGE:
        clean = clean[:_LONGEST_MESSAGE] + "..."
    if param is not None:
        param = param.encode("utf-8", "replace").decode("utf-8")[:200]
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": clean, "type": kind, "param": param, "code": code}}


def body_of(error: HeadraceError) -> dict[str, Any]:
    """The JSON object of one of our own errors."""
    return error_body(error.status, error.message, param=error.field, code=error.code)


def response_of(error: HeadraceError) -> Response:
    """The whole response to one of our own errors, with ``Retry-After`` where waiting helps."""
    headers = dict(getattr(error, "headers", {}))
    if isinstance(error, Overloaded):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    elif error.status == 503:
        headers.setdefault("retry-after", "1")
    return json_response(body_of(error), error.status, headers)


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON response in UTF-8."""
    return Response(encode(content), status, dict(headers or {}), media_type="application/json")


def encode(content: Any) -> bytes:
    """Compact JSON in one line; a lone surrogate becomes a question mark rather than an error."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    if not text.isascii():
        for raw, escaped in _SEPARATORS:
            text = text.replace(raw, escaped)
    return text.encode("utf-8", "replace")


def internal_error() -> HeadraceError:
    """What a client learns of a defect of ours: nothing but that it is ours."""
    return HeadraceError("the server met an internal error; its log has the details")


def install(app: FastAPI) -> None:
    """Have ``app`` answer every exception in OpenAI's shape."""
    app.add_exception_handler(HeadraceError, _on_headrace)
    app.add_exception_handler(RequestValidationError, _on_validation)
    app.add_exception_handler(HTTPException, _on_http)


async def _on_headrace(request: Request, error: Exception) -> Response:
    assert isinstance(error, HeadraceError)
    return response_of(error)


async def _on_validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    message, param, code = explain(error.errors())
    return json_response(error_body(400, message, param=param, code=code), 400)


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    status = error.status_code
    if status == 404:
        message = f"there is no {request.method} {request.url.path} here"
    elif status == 405:
        message = f"{request.url.path} does not take {request.method}"
    else:
        message = str(error.detail)
    code = _CODES.get(status, "invalid_value" if status < 500 else "internal_error")
    return json_response(error_body(status, message, code=code), status, error.headers)


def explain(errors: Sequence[Mapping[str, Any]]) -> tuple[str, str | None, str]:
    """(message, param, code) for pydantic's list of errors; of the values the client sent only single numbers are repeated."""
    if not errors:
        return "the request is not valid", None, "invalid_value"
    first = errors[0]
    where = [part for part in first["loc"] if part not in _BODY_FIELDS]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "not JSON")
        return f"the body is not valid JSON at byte {where[0] if where else 0}: {reason}", None, "invalid_json"
    if not where:
        return "the body must be a JSON object", None, "invalid_value"
    param = str(where[0])
    if first["type"] == "missing" and len(where) == 1:
        return f"{param} is missing", param, "missing_required_parameter"
    own = [error for error in errors if [p for p in error["loc"] if p not in _BODY_FIELDS][:1] == where[:1]]
    reasons = list(dict.fromkeys(str(error["msg"]) for error in own))
    path = ".".join(str(part) for part in where) if len(own) == 1 else param
    value = first.get("input")
    given = f" (it is {value!r:.30})" if isinstance(value, int | float) and len(own) == 1 else ""
    return f"{path}: {'; or: '.join(reasons[:4])}{given}", param, "invalid_value"
