"""The sections of a configuration: most belong to one runtime, and all of them may stand in one file."""

from __future__ import annotations

from freedraft.integrations.hf.settings import GenerateSettings
from freedraft.integrations.vllm.gpu.settings import GpuSettings
from freedraft.integrations.vllm.settings import VllmSettings
from freedraft.plugins.config import Config, Settings, validate_settings
from freedraft.plugins.pacing import PacingSettings

SECTIONS: dict[str, type[Settings]] = {
    "generate": GenerateSettings,
    "gpu": GpuSettings,
    "pacing": PacingSettings,
    "vllm": VllmSettings,
}


def check_sections(config: Config) -> None:
    """Check every section that is given, those too that the runtime at hand does not read.

    Raises:
        ConfigError: an unknown setting, or a bad value.
    """
    for name, values in config.sections.items():
        validate_settings(SECTIONS[name], values, name)
