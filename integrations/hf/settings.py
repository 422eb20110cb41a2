"""The section `generate` of a configuration: what belongs to this runtime and not to a drafter."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from freedraft.plugins.config import Settings


class GenerateSettings(Settings):
    """Settings of the decoding loop."""

    max_draft: int = Field(
        64, ge=0, le=4096, description="No draft has more tokens, whatever the drafter proposes; 0 drafts nothing."
    )
    acceptance: Literal["exact", "typical"] = Field(
        "exact",
        description="The acceptance rule. `exact` is lossless. `typical` is lossy: with sampling it also accepts draft "
        "tokens that the target merely finds plausible (Medusa, Cai et al. 2024, section 3.3.1).",
    )
    epsilon: float = Field(
        0.09,
        gt=0,
        le=1,
        description="For `typical`: the probability above which a draft token is always accepted; lower accepts more.",
    )
    delta: float = Field(
        0.3,
        gt=0,
        le=1,
        description="For `typical`: how far that is lowered where the target is undecided; lower accepts more.",
    )

    @field_validator("epsilon", "delta")
    @classmethod
    def _of_typical(cls, value: float, info: ValidationInfo) -> float:
        default = cls.model_fields[str(info.field_name)].default
        if value != default and info.data.get("acceptance") != "typical":
            raise ValueError("is for acceptance: typical, which is lossy and must be asked for by name")
        return value
