"""A drafter described for people: what it is, and its settings."""

from __future__ import annotations

from typing import Any

from pydantic import ByteSize

from freedraft.plugins.registry import drafter_class


def describe(name: str) -> dict[str, Any]:
    """The first line of its docstring, and type, default and description of each setting."""
    loaded = drafter_class(name)
    settings = {
        key: {
            "type": _type_name(field.annotation),
            "default": "required" if field.is_required() else _readable(field.get_default(call_default_factory=True)),
            "description": field.description or "",
        }
        for key, field in loaded.Settings.model_fields.items()
    }
    return {"summary": (loaded.__doc__ or "").strip().split("\n")[0], "settings": settings}


def _readable(default: Any) -> Any:
    if isinstance(default, ByteSize):
        return default.human_readable()
    return default if isinstance(default, str | int | float | bool | list | None) else str(default)


def _type_name(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")
