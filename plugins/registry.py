"""The registry: from a drafter's name to its class, through the entry-point group `freedraft.drafters`."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from freedraft.plugins.base import Drafter
from freedraft.plugins.config import Config, validate_settings
from freedraft.retrieval.errors import ConfigError

GROUP = "freedraft.drafters"


def drafter_names() -> list[str]:
    """The names of all installed drafters, ours and third parties', sorted."""
    return sorted(_installed())


def drafter_class(name: str) -> type[Drafter]:
    """Load the class registered as `name`.

    Raises:
        ConfigError: no such name; the message lists the names there are.
        ImportError: its module needs a package that is not installed.
    """
    installed = _installed()
    if name not in installed:
        close = get_close_matches(name, installed, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ConfigError(f"drafter: unknown drafter {name!r}; {hint}installed: {', '.join(sorted(installed))}")
    loaded = installed[name].load()
    missing = [
        member
        for member in ("Settings", "feedback", "open", "extend", "draft", "observe", "close")
        if not hasattr(loaded, member)
    ]
    if missing:
        raise ConfigError(f"drafter {name!r}: {installed[name].value} is not a Drafter: it lacks {', '.join(missing)}")
    return loaded


def make_drafter(name: str, settings: Mapping[str, Any] | None = None, *, rehearsing: bool = False) -> Drafter:
    """Build the drafter registered as `name` from its settings.

    Args:
        rehearsing: it will see made-up text only, see `DrafterSettings.rehearsing`.

    Raises:
        ConfigError: unknown name, unknown setting or bad value.
    """
    cls = drafter_class(name)
    validated = validate_settings(cls.Settings, settings or {}, name)
    return cls(validated.rehearsing() if rehearsing else validated)  # type: ignore[call-arg]


def rehearsed(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the drafter registered as `name` as `DrafterSettings.rehearsing` changes them.

    Raises:
        ConfigError: as `make_drafter`.
    """
    return validate_settings(drafter_class(name).Settings, settings, name).rehearsing().model_dump()


def drafter_from_config(config: Config, *, rehearsing: bool = False) -> Drafter:
    """Build the drafter that a parsed configuration names; as `make_drafter`."""
    return make_drafter(config.drafter, config.settings, rehearsing=rehearsing)


def _installed() -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=GROUP):
        # The first distribution to claim a name keeps it, except that ours always keeps its own.
        if entry.name not in found or entry.value.startswith("freedraft."):
            found[entry.name] = entry
    return found
