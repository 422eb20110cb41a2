"""Configuration: from a dict, a JSON string or a YAML file to a validated drafter's settings.

The same mapping everywhere, flat: `drafter` names the drafter, the reserved sections `generate` and `vllm` hold
what belongs to a runtime, `gpu` what drafts on a GPU, `pacing` how much of a draft is verified, and every other key is
a setting of the drafter:

    drafter: suffix_automaton
    max_tokens: 12
    memory: 2GiB
    pacing: off
    vllm:
      log_interval: 10
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from freedraft.retrieval.errors import ConfigError

DEFAULT_DRAFTER = "fusion"
SECTIONS = ("generate", "gpu", "pacing", "vllm")
SWITCHES = {"on": True, "off": False, True: True, False: False}
ENVIRONMENT_VARIABLE = "FREEDRAFT_CONFIG"


class Settings(BaseModel):
    """Base of every settings model: immutable, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        # YAML reads yes and on as true, which would pass for 1.
        if isinstance(value, bool) and "bool" not in str(cls.model_fields[str(info.field_name)].annotation):
            raise ValueError("expected a value, not true or false")
        return value


class DrafterSettings(Settings):
    """Base of every drafter's settings."""

    def rehearsing(self) -> Self:
        """These settings for a drafter that only sees made-up text, by which a runtime has the kernels compiled.

        To be overridden where a drafter leaves text behind: that drafter must not.
        """
        return self


@dataclass(frozen=True)
class Config:
    """A parsed configuration.

    Attributes:
        drafter: the drafter's registered name.
        settings: the drafter's own settings, not yet validated: its model does that in `registry.make_drafter`.
        sections: the sections by name, of `SECTIONS`, likewise; empty where none was given.
    """

    drafter: str = DEFAULT_DRAFTER
    settings: Mapping[str, Any] = field(default_factory=dict)
    sections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def parse_config(source: Config | Mapping[str, Any] | str | os.PathLike[str] | None) -> Config:
    """Read a configuration from a mapping, a JSON object in a string, or the path of a YAML (or JSON) file.

    A mapping with the key `config` and nothing else stands for the file that it names. None gives the defaults.

    Raises:
        ConfigError: unreadable file, not a mapping, a key that is there twice, or a section that is not a mapping.
    """
    if source is None:
        return Config()
    if isinstance(source, Config):
        return source
    if isinstance(source, Mapping):
        if set(source) != {"config"}:
            return _from_mapping(source, "configuration")
        source = source["config"]
        if not isinstance(source, str | os.PathLike):
            raise ConfigError(f"configuration: config: expected the path of a file, got {source!r}")
        return _from_file(Path(source))
    if isinstance(source, str) and source.lstrip().startswith(("{", "[")):
        try:
            return _from_mapping(json.loads(source, object_pairs_hook=_each_once), "configuration (JSON string)")
        except (json.JSONDecodeError, RecursionError) as error:
            raise ConfigError(f"configuration: not valid JSON: {error}") from error
    if not isinstance(source, str | os.PathLike):
        raise ConfigError(f"configuration: expected a mapping, a JSON string or the path of a file, got {source!r}")
    return _from_file(Path(source))


def validate_settings(model: type[SettingsT], values: Mapping[str, Any], where: str) -> SettingsT:
    """Validate `values` with a settings model.

    Raises:
        ConfigError: one line for each bad key: the path to it, what was given and what is allowed.
    """
    try:
        return model(**values)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(model, item, where) for item in error.errors())) from error
    except TypeError as error:
        raise ConfigError(f"{where}: keys must be strings: {error}") from error


SettingsT = TypeVar("SettingsT", bound=Settings)


def _from_file(path: Path) -> Config:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"configuration file {path}: {error}") from error
    try:
        content = yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"configuration file {path}: not valid YAML: {error}") from error
    if content is None:
        return Config()
    return _from_mapping(content, f"configuration file {path}")


def _from_mapping(mapping: Any, where: str) -> Config:
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{where}: expected a mapping of settings, got {type(mapping).__name__}")
    values = dict(mapping)
    drafter = values.pop("drafter", DEFAULT_DRAFTER)
    if not isinstance(drafter, str):
        raise ConfigError(f"{where}: drafter: expected a name, got {drafter!r}")
    sections = {}
    for name in SECTIONS:
        section = values.pop(name, None)
        if section is None:
            section = {}
        elif name == "pacing" and isinstance(section, bool | str) and section in SWITCHES:
            # YAML reads off as a false; JSON and the command line say it as a word.
            section = {"enabled": SWITCHES[section]}
        if not isinstance(section, Mapping):
            raise ConfigError(f"{where}: {name}: expected a mapping of settings, got {section!r}")
        sections[name] = section
    return Config(drafter, values, sections)


def _explain(model: type[Settings], item: Any, where: str) -> str:
    path = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        known = sorted(model.model_fields)
        close = get_close_matches(str(item["loc"][-1]), known, n=1) if len(item["loc"]) == 1 else []
        hint = f"did you mean {close[0]}? " if close else ""
        return f"{where}: {path}: unknown setting; {hint}allowed: {', '.join(known) or 'none'}"
    if not path:
        return f"{where}: {item['msg']}"
    return f"{where}: {path}: {item['msg']}, got {item['input']!r}"


def _each_once(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ConfigError(f"configuration: {next(key for key in keys if keys.count(key) > 1)}: the key is there twice")
    return mapping


class _Loader(yaml.SafeLoader):
    """The safe loader, but a key that is there twice is an error: YAML's own rule, which PyYAML does not hold to."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        _each_once([(key.value, None) for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
        return super().construct_mapping(node, deep)
