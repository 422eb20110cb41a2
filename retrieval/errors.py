"""The one exception family of freedraft."""

from __future__ import annotations


class FreedraftError(Exception):
    """Base of every error that freedraft raises on purpose."""


class InputError(FreedraftError, ValueError):
    """An argument has the wrong shape, type or range; the message says what was given and what is expected."""


class ConfigError(FreedraftError, ValueError):
    """A configuration has an unknown key or a bad value; the message gives the path to it and what is allowed."""


class UnsupportedError(FreedraftError, ValueError):
    """What was asked for cannot work with this model or with these generation options; the message says why."""


class CapacityError(FreedraftError, MemoryError):
    """A bound that the configuration sets was reached; the message names the setting."""
