"""The user's cache folder, where headrace keeps what it compiled and measured on this machine."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from headrace.core.errors import HeadraceError


class CacheUnavailable(HeadraceError):
    """The cache folder cannot be created, or is not ours; the message names it."""

    code = "cache_unavailable"


def cache_folder(part: str) -> Path:
    """The folder ``part`` of the cache, created if need be and closed to other users.

    The cache is ``$HEADRACE_CACHE``, else ``$XDG_CACHE_HOME/headrace``, else ``~/.cache/headrace``.

    Raises:
        CacheUnavailable: it cannot be created, or belongs to somebody else, who could then choose what we read or run.
    """
    override, xdg = os.environ.get("HEADRACE_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        root = Path(override) if override else (Path(xdg) if xdg else Path.home() / ".cache") / "headrace"
        folder = root / part
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for each in (root, folder):
            info = each.stat()
            if hasattr(os, "getuid") and info.st_uid != os.getuid():
                raise CacheUnavailable(
                    f"the cache folder {each} belongs to another user: set HEADRACE_CACHE to one of your own"
                )
            if stat.S_IMODE(info.st_mode) & 0o022:
                each.chmod(0o700)
    except (OSError, RuntimeError) as error:
        raise CacheUnavailable(f"no cache folder ({error}): set HEADRACE_CACHE to a writable one") from error
    return folder
