"""The section `vllm` of a configuration: what belongs to this runtime and not to a drafter."""

from __future__ import annotations

from pydantic import Field

from freedraft.plugins.config import Settings


class VllmSettings(Settings):
    """Settings of the proposer."""

    log_interval: float = Field(10.0, ge=0, description="Seconds between two lines of statistics; 0 = none.")
    step_tokens: int = Field(
        8192,
        ge=1,
        description="Committed tokens that the drafter takes in per engine step, at most; a long prompt is taken in "
        "over several steps, and drafting for it starts after the last.",
    )
    idle_sequences: int = Field(
        64, ge=0, description="Sequences that are in no row, preempted or ended, whose state is kept, at most."
    )
    idle_tokens: int = Field(2**18, ge=0, description="Tokens of those sequences, at most.")
    idle_steps: int = Field(
        8,
        ge=0,
        description="Engine steps that a sequence may be in no row before it is closed; the reply of one that "
        "was alone is a source of drafts for others only then.",
    )
    short_verification: bool = Field(
        True,
        description="Let steps without a draft, and on a CPU those that decode greedily, take a shorter way through "
        "vLLM's verification, for the whole process: the same greedy or seeded tokens, and others of the same "
        "distribution.",
    )
