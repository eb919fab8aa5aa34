"""Errors that users meet. Each names the field, says what is wrong and how to mend it.

Faces translate them: the server into OpenAI's error object with ``status``, the command line into
one line and exit status 2.
"""

from __future__ import annotations


class HeadraceError(Exception):
    """Base of every error headrace raises on purpose.

    Attributes:
        message: what is wrong and what to do, for a person.
        field: the request field, option or file concerned, or None.
        code: a stable machine-readable word, as in OpenAI's ``error.code``.
        status: the HTTP status a server answers with.
    """

    status = 500
    code = "internal_error"

    def __init__(self, message: str, *, field: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        if code is not None:
            self.code = code

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle with all attributes, so that errors cross the engine's process boundary whole."""
        return _rebuild, (type(self), dict(self.__dict__))


def _rebuild(kind: type[HeadraceError], attributes: dict[str, object]) -> HeadraceError:
    error = kind(str(attributes["message"]))
    error.__dict__.update(attributes)
    return error


class InvalidRequest(HeadraceError):
    """A request that cannot be served as written (HTTP 400)."""

    status = 400
    code = "invalid_value"


class ContextTooLong(InvalidRequest):
    """Prompt and requested output do not fit the model's context or the slot pool (HTTP 400)."""

    code = "context_length_exceeded"


class ModelNotFound(HeadraceError):
    """No model of that name is served, or no such folder or hub name exists (HTTP 404)."""

    status = 404
    code = "model_not_found"


class UnsupportedModel(HeadraceError):
    """The checkpoint loads elsewhere but not here; the message names the reason and the alternative."""

    status = 400
    code = "unsupported_model"


class BrokenCheckpoint(HeadraceError):
    """The checkpoint's files are missing, truncated, of the wrong shape or of an unsafe format."""

    status = 400
    code = "broken_checkpoint"


class Overloaded(HeadraceError):
    """The queue is full (HTTP 429). ``retry_after_s`` is when trying again makes sense, in seconds."""

    status = 429
    code = "rate_limit_exceeded"

    def __init__(
        self, message: str, *, field: str | None = None, code: str | None = None, retry_after_s: float = 1.0
    ) -> None:
        super().__init__(message, field=field, code=code)
        self.retry_after_s = retry_after_s


class EngineUnavailable(HeadraceError):
    """The engine is loading, draining or has just crashed (HTTP 503)."""

    status = 503
    code = "engine_unavailable"


class OutOfMemory(HeadraceError):
    """A step did not fit the device; only the requests of that step are concerned (HTTP 503)."""

    status = 503
    code = "out_of_memory"
