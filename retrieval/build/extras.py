"""Packages of the `index` extra, imported where they are used."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from freedraft.retrieval.index.errors import MissingPackageError


def require(module: str, what: str) -> Any:
    """Import `module`; `what` needs it.

    Raises:
        MissingPackageError: it is not installed; the message names the extra that brings it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingPackageError(
            f"{what} needs {package}, which is not installed: pip install 'freedraft[index]'"
        ) from error
