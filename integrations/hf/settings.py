"""The section `generate` of a configuration: what belongs to this runtime and not to a drafter."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from freedraft.plugins.config import Settings


class GenerateSettings(Settings):
    """Settings of the decoding loop.

    Attributes:
        max_draft: no draft has more tokens, whatever the drafter proposes; 0 drafts nothing.
        acceptance: the acceptance rule. `exact` is lossless. `typical` is lossy: with sampling it also accepts draft
            tokens that the target merely finds plausible (Medusa, Cai et al. 2024, section 3.3.1).
        epsilon: for `typical`, the probability above which a draft token is always accepted; lower accepts more.
        delta: for `typical`, how far that is lowered where the target is undecided; lower accepts more.
    """

    max_draft: int = Field(default=64, ge=0, le=4096)
    acceptance: Literal["exact", "typical"] = "exact"
    epsilon: float = Field(default=0.09, gt=0, le=1)
    delta: float = Field(default=0.3, gt=0, le=1)

    @field_validator("epsilon", "delta")
    @classmethod
    def _of_typical(cls, value: float, info: ValidationInfo) -> float:
        default = cls.model_fields[str(info.field_name)].default
        if value != default and info.data.get("acceptance") != "typical":
            raise ValueError("is for acceptance: typical, which is lossy and must be asked for by name")
        return value
