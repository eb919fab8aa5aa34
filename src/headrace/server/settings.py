"""Every knob of the server, as plain data."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from headrace.core.errors import InvalidRequest
from headrace.server.slo.classes import SLOClasses


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """How the server behaves. Times are seconds, sizes bytes.

    Attributes:
        api_keys: (label, key) pairs; none means that everybody is let in. The label stands for the client in the engine
            (``Request.owner``) and in the log; the key itself is neither logged nor shown by ``repr``.
        protect_metrics: ask for a key at ``/metrics`` too.
        slo_classes: latency targets by name, and which of them a request gets.
        allowed_hosts: names by which the server may be called beside those that are always good; see
            :mod:`headrace.server.guards.hosts`. ``("*",)`` allows all.
        dashboard: serve ``/dashboard``.
        max_body_bytes: largest request body; a larger one is refused (413) while it arrives.
        body_timeout_s: how long a body may take to arrive (408).
        max_open_requests: HTTP requests worked on at once, above which new ones are refused (429).
        max_choices: prompts times ``n`` of one request.
        tokenizer_threads: threads that tokenise long prompts beside the event loop.
        accept_wait_s: how long a stream's status line waits for the engine to accept or refuse the request.
        grammar_wait_s: the same for a request with a grammar, which the engine refuses only after trying to compile it.
        keep_alive_s: silence in a stream after which a comment is sent, so that proxies keep it open.
        write_timeout_s: how long a client may leave a stream unread before it is cut.
        drain_timeout_s: how long open requests may go on after a signal to stop.
        cors_origins: origins whose pages may call us from a browser; none by default, ``("*",)`` for all.
        access_log: log one line per request on the logger ``headrace.access``.
    """

    api_keys: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    protect_metrics: bool = False
    slo_classes: SLOClasses = field(default_factory=SLOClasses)
    allowed_hosts: tuple[str, ...] = ()
    dashboard: bool = True
    max_body_bytes: int = 8 << 20
    body_timeout_s: float = 60.0
    max_open_requests: int = 2048
    max_choices: int = 256
    tokenizer_threads: int = 2
    accept_wait_s: float = 1.0
    grammar_wait_s: float = 30.0
    keep_alive_s: float = 15.0
    write_timeout_s: float = 120.0
    drain_timeout_s: float = 30.0
    cors_origins: tuple[str, ...] = ()
    access_log: bool = True

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_open_requests", "max_choices", "tokenizer_threads"):
            if getattr(self, name) < 1:
                raise InvalidRequest(f"{name} is {getattr(self, name)}: give at least 1", field=name)
        for name in ("body_timeout_s", "keep_alive_s", "write_timeout_s"):
            if not getattr(self, name) > 0:
                raise InvalidRequest(f"{name} is {getattr(self, name)}: give seconds above 0", field=name)
        for name in ("accept_wait_s", "grammar_wait_s", "drain_timeout_s"):
            if not getattr(self, name) >= 0:
                raise InvalidRequest(f"{name} is {getattr(self, name)}: give seconds from 0", field=name)
        for label, key in self.api_keys:
            if not label or not key:
                raise InvalidRequest("an API key needs a label and a key, neither of them empty", field="api_keys")
        if len({key for _, key in self.api_keys}) < len(self.api_keys):
            raise InvalidRequest("the same API key is given twice: give each client its own", field="api_keys")

    def key_digests(self) -> tuple[tuple[str, bytes], ...]:
        """(label, SHA-256 of the key) pairs, all that the running server keeps of the keys."""
        return tuple((label, digest(key.encode())) for label, key in self.api_keys)


def digest(key: bytes) -> bytes:
    """SHA-256: equal length for every key, so that comparing takes the same time for all."""
    return hashlib.sha256(key).digest()
