"""The HTTP face: OpenAI's API over a :class:`headrace.core.protocols.Service`.

``create_app`` builds the application, ``run_server`` serves it, :class:`ServerSettings` holds every knob. They are
imported on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headrace.server.app import create_app
    from headrace.server.run import run_server
    from headrace.server.settings import ServerSettings

_LAZY = {
    "create_app": "headrace.server.app",
    "run_server": "headrace.server.run",
    "ServerSettings": "headrace.server.settings",
}

__all__ = ["ServerSettings", "create_app", "run_server"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'headrace.server' has no attribute {name!r}")
