"""The section `gpu` of a configuration: what can be set of the drafting on the GPU."""

from __future__ import annotations

import logging
from typing import Any, Self

from pydantic import Field, model_validator

from freedraft.plugins.config import Settings, parse_config, validate_settings
from freedraft.retrieval.cuda.rules import Rules
from freedraft.retrieval.errors import ConfigError

logger = logging.getLogger("freedraft")


class GpuSettings(Settings):
    """Settings of the speculator. The drafts' length is vLLM's `num_speculative_tokens`."""

    max_match: int = Field(64, ge=1, le=4096, description="Longer matches count as this long.")
    min_match: int = Field(1, ge=1, le=4096, description="Shorter matches do not count.")
    min_probability: float = Field(0.0, ge=0, le=1, description="A draft ends before a less probable token.")
    index: str | list[str] | None = Field(
        None, description="Folder of an index, or several, to upload to the GPU and draft from as well."
    )
    index_min_match: int = Field(
        2, ge=1, le=2**20, description="Draft from an index after a suffix of so many tokens that it knows."
    )
    tokenizer: str | None = Field(
        None, description="The model's tokenizer.json, or its folder: indexes of another one are refused."
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_match > self.max_match:
            raise ValueError(f"min_match must not exceed max_match ({self.max_match})")
        return self

    @property
    def rules(self) -> Rules:
        """The limits of the search."""
        return Rules(self.max_match, self.min_match, least=self.min_probability)


def gpu_settings(given: Any) -> GpuSettings:
    """The settings, from what `additional_config["freedraft"]` holds.

    Raises:
        ConfigError: not a mapping, an unknown key in `gpu`, or a bad value.
    """
    if not isinstance(given, dict):
        raise ConfigError(f"additional_config: freedraft: expected a mapping of settings, got {given!r}")
    settings = validate_settings(GpuSettings, parse_config(given).sections.get("gpu", {}), "gpu")
    others = sorted({*given} - {"gpu", "config"})
    if others:
        logger.warning("freedraft: ngram_gpu drafts on the GPU; %s do not apply there", ", ".join(others))
    return settings
