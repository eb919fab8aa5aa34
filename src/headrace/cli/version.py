"""``headrace version``."""

from __future__ import annotations


def version() -> None:
    """Print the versions of headrace and of what it runs on."""
    import platform
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    from headrace.version import __version__

    print(f"headrace {__version__}")
    print(f"python {platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in ("torch", "transformers", "numba", "xgrammar"):
        try:
            print(f"{package} {installed(package)}")
        except PackageNotFoundError:
            print(f"{package} is not installed")
