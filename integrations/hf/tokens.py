"""The text of a call as a tensor that grows in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class Tokens:
    """Committed token ids int64 `(1, length)`, with room for a draft behind them.

    A view that `committed` handed out stays as it was: later writes only touch what lies behind it, so a logits
    processor may keep one, and none is copied.
    """

    def __init__(self, input_ids: torch.Tensor) -> None:
        self.length = int(input_ids.shape[1])
        self._storage = input_ids.clone()

    def committed(self) -> torch.Tensor:
        """View int64 `(1, length)`."""
        return self._storage[:, : self.length]

    def with_draft(self, draft: Sequence[int]) -> torch.Tensor:
        """View int64 `(1, length + len(draft))`, valid until the next call of any method."""
        end = self.length + len(draft)
        self._reserve(end)
        if draft:
            self._storage[0, self.length : end] = torch.tensor(draft)
        return self._storage[:, :end]

    def append(self, token: int) -> None:
        """Commit one token."""
        self._reserve(self.length + 1)
        self._storage[0, self.length] = token
        self.length += 1

    def _reserve(self, capacity: int) -> None:
        if capacity > self._storage.shape[1]:
            # A new storage: views of the old one keep it alive, and unchanged.
            grown = self._storage.new_empty((1, 2 * capacity + 64))
            grown[:, : self.length] = self.committed()
            self._storage = grown
