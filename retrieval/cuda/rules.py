"""What a scan looks for, and the shapes of what it reads and writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from freedraft.retrieval.errors import InputError

MOST_DRAFTED = 128


@dataclass(frozen=True, slots=True)
class Rules:
    """Limits of a scan.

    Attributes:
        longest: a match is followed back this far; longer ones count as this long.
        shortest: the shortest match that counts, from 1.
        budget: tokens to draft a row, at most; None = as many as `drafts` has columns.
        least: a draft ends before the token whose probability is below this.
    """

    longest: int = 64
    shortest: int = 1
    budget: int | None = None
    least: float = 0.0

    def __post_init__(self) -> None:
        """Raise InputError if the limits leave nothing to find."""
        if not 1 <= self.shortest <= self.longest < 2**31:
            raise InputError(
                f"rules: expected 1 <= shortest <= longest < 2**31, got {self.shortest} and {self.longest}"
            )
        if self.budget is not None and self.budget < 0:
            raise InputError(f"rules: budget: expected None or at least 0, got {self.budget}")

    def limit(self, columns: int) -> int:
        """The tokens to draft a row when there is room for `columns`."""
        return columns if self.budget is None else min(self.budget, columns)


def checked_batch(
    tokens: Any, lengths: Any, rows: Any, active: Any, drafts: Any, probability: Any, counts: Any
) -> None:
    """Check the arrays of a batch, wherever they are; looks at shapes and types only.

    Raises:
        InputError: which array, what was given, what is expected.
    """
    if tokens.ndim != 2 or drafts.ndim != 2:
        raise InputError(f"tokens and drafts: expected two axes, got shapes {tokens.shape} and {drafts.shape}")
    batch, columns = drafts.shape
    if not 1 <= columns <= MOST_DRAFTED:
        raise InputError(f"drafts: expected 1 to {MOST_DRAFTED} columns, got {columns}")
    expected = {
        "tokens": (tokens, tokens.shape, "int32"),
        "lengths": (lengths, (tokens.shape[0],), "int32"),
        "rows": (rows, (batch,), "int64"),
        "active": (active, (batch,), "int32"),
        "drafts": (drafts, (batch, columns), "int64"),
        "probability": (probability, (batch, columns), "float32"),
        "counts": (counts, (batch,), "int32"),
    }
    for name, (array, shape, kind) in expected.items():
        if tuple(array.shape) != tuple(shape) or str(array.dtype) != kind:
            raise InputError(f"{name}: expected {kind} {tuple(shape)}, got {array.dtype} {tuple(array.shape)}")
