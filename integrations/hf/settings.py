"""The section `generate` of a configuration: what belongs to this runtime and not to a drafter."""

from __future__ import annotations

from pydantic import Field

from freedraft.plugins.config import Settings


class GenerateSettings(Settings):
    """Settings of the decoding loop.

    Attributes:
        max_draft: no draft is longer, whatever the drafter proposes; 0 drafts nothing.
    """

    max_draft: int = Field(default=64, ge=0, le=4096)
