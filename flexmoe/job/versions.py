"""Versions of what made a result."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("flexmoe", "torch", "transformers", "tokenizers", "safetensors", "numpy")


def versions() -> dict[str, str | None]:
    """Of Python and the libraries that decide the numbers; None for one that is not installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
