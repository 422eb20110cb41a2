"""What a call of `generate` cost, and what speculation saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields


@dataclass(slots=True)
class Statistics:
    """Counts and times of one call of `generate`, or of several, added up with `+`.

    A step is what a forward pass does for one sequence, so that a pass over a batch of four is four steps.

    Attributes:
        calls: calls of `generate`.
        tokens: tokens generated; plain decoding needs one step for each.
        forward_passes: forward passes of the model, the one over the prompt included.
        drafts: forward passes that verified a draft of at least one token.
        drafted: draft tokens verified.
        accepted: draft tokens that became part of the text.
        drafter_errors: calls of the drafter that failed or broke the contract while this one ran, whichever thread made
            them; they cost drafts, never text.
        prefill_seconds: the forward pass over the prompt.
        drafting_seconds: spent in the drafter.
        verifying_seconds: every other forward pass, up to and including the target's choice of its first token.
        total_seconds: from the first line of our code to the last.
        steps: forward passes, each counted for every sequence in it.
        lossy: calls whose acceptance rule may change the output; only one that was asked for by name does.
        proposed: draft tokens that the drafter had; pacing leaves out those that would cost more time than they save.
    """

    calls: int = 0
    tokens: int = 0
    forward_passes: int = 0
    drafts: int = 0
    drafted: int = 0
    accepted: int = 0
    drafter_errors: int = 0
    prefill_seconds: float = 0.0
    drafting_seconds: float = 0.0
    verifying_seconds: float = 0.0
    total_seconds: float = 0.0
    proposed: int = 0
    steps: int = 0
    lossy: int = 0

    def prefilled(self, sequences: int) -> None:
        """Count the forward pass over the prompts."""
        self.forward_passes += 1
        self.steps += sequences

    def verified(self, drafted: Sequence[int], seconds: float) -> None:
        """Count a forward pass that verified so many draft tokens of each sequence in `seconds`."""
        self.forward_passes += 1
        self.steps += len(drafted)
        self.drafts += max(drafted) > 0
        self.drafted += sum(drafted)
        self.verifying_seconds += seconds

    def committed(self, tokens: int, accepted: int) -> None:
        """Count tokens of the output, `accepted` of which had been drafted."""
        self.tokens += tokens
        self.accepted += accepted

    @property
    def rest_seconds(self) -> float:
        """What is left of the total: logits processors and sampling, stopping criteria, streamer, cache, loop."""
        return max(0.0, self.total_seconds - self.prefill_seconds - self.drafting_seconds - self.verifying_seconds)

    @property
    def tokens_per_step(self) -> float:
        """Mean tokens a forward pass and sequence; 1 is plain decoding, 0 when there was no pass."""
        return self.tokens / self.steps if self.steps else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second of the total, 0 when no time was taken."""
        return self.tokens / self.total_seconds if self.total_seconds else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Share of the draft tokens that were accepted, 0 when there was none."""
        return self.accepted / self.drafted if self.drafted else 0.0

    def as_dict(self) -> dict[str, float]:
        """All counts, times (seconds) and ratios, ready for JSON."""
        derived = ("rest_seconds", "tokens_per_step", "tokens_per_second", "acceptance_rate")
        return {name: getattr(self, name) for name in (*(f.name for f in fields(self)), *derived)}

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __str__(self) -> str:
        times = ", ".join(
            f"{name} {getattr(self, f'{name}_seconds'):.3f}" for name in ("prefill", "drafting", "verifying", "rest")
        )
        errors = f"; {self.drafter_errors} drafter errors" if self.drafter_errors else ""
        lossy = "; lossy acceptance" if self.lossy else ""
        return (
            f"{self.tokens} tokens in {self.forward_passes} forward passes ({self.tokens_per_step:.2f} tokens a step); "
            f"{self.accepted} of {self.drafted} draft tokens accepted ({self.acceptance_rate:.0%}); "
            f"{self.total_seconds:.3f} s ({times}){errors}{lossy}"
        )
