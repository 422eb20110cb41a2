"""Drafters and sections of the configuration described for people: what they are, and their settings."""

from __future__ import annotations

from typing import Any

from pydantic import ByteSize

from freedraft.integrations.sections import SECTIONS
from freedraft.plugins.config import Settings
from freedraft.plugins.registry import drafter_class


def describe_drafter(name: str) -> dict[str, Any]:
    """The first line of a drafter's docstring, and its settings."""
    loaded = drafter_class(name)
    return {"summary": _first_line(loaded), "settings": _settings(loaded.Settings)}


def describe_section(name: str) -> dict[str, Any]:
    """The first line of a section's docstring, and its settings."""
    return {"summary": _first_line(SECTIONS[name]), "settings": _settings(SECTIONS[name])}


def _first_line(described: Any) -> str:
    return (described.__doc__ or "").strip().split("\n")[0]


def _settings(model: type[Settings]) -> dict[str, Any]:
    """Type, default and description of each setting."""
    return {
        key: {
            "type": _type_name(field.annotation),
            "default": "required" if field.is_required() else _readable(field.get_default(call_default_factory=True)),
            "description": field.description or "",
        }
        for key, field in model.model_fields.items()
    }


def _readable(default: Any) -> Any:
    if isinstance(default, ByteSize):
        return default.human_readable()
    return default if isinstance(default, str | int | float | bool | list | None) else str(default)


def _type_name(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")
