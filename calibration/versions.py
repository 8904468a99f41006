"""Versions of installed packages."""

from __future__ import annotations

import importlib.metadata
import platform

SHAPING = ("rankbook", "torch", "transformers", "safetensors", "numpy")
"""Packages that shape a result."""


def installed(package: str) -> str | None:
    """Return the version of a package, or None where it is not installed as one."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions(*more: str) -> dict[str, str]:
    """Return the versions of Python, of rankbook and of the libraries that shape a result, and of ``more``."""
    found = {package: installed(package) or "not installed as a package" for package in (*SHAPING, *more)}
    return {"python": platform.python_version(), **found}
