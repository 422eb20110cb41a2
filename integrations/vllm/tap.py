"""The target's likeliest tokens at each verified position, taken from the logits that vLLM has computed anyway.

vLLM gives a proposer no logits. They all come through one method of its model runner, `_sample`, right before
sampling: those of each row's last committed token and of each of its draft tokens, row after row, with a grammar's mask
applied. The tap stands before that method, looks, and passes everything on as it is: no extra matrix product, and the
result is vLLM's own. It is put there only for a drafter that asks for it.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, NamedTuple, Protocol

import numpy as np

from freedraft.retrieval.errors import UnsupportedError
from freedraft.retrieval.ragged import Int32, Int64

logger = logging.getLogger("freedraft")


class Ranked(NamedTuple):
    """What the target ranked high in one step of the batch.

    Attributes:
        top_k: int32 `(positions, k)`, likeliest first.
        offsets: int64 `(rows + 1,)`, positions of each row: of its last committed token, then of its draft's.
    """

    top_k: Int32
    offsets: Int64


class RankingSource(Protocol):
    """Where a step's rankings come from.

    Attributes:
        errors: steps of which they could not be had.
    """

    errors: int

    def take(self, rows: int) -> Ranked | None:
        """What the last step showed, once; None if nothing, or if it was not of so many rows."""
        ...

    def remove(self) -> None:
        """Look no more."""
        ...


class MadeUpRankings:
    """Stands in for a tap where no model runs, in a rehearsal: token 0 ranks first everywhere."""

    errors = 0

    def __init__(self, k: int) -> None:
        self._k = k

    def take(self, rows: int) -> Ranked:
        """A position a row."""
        return Ranked(np.zeros((rows, self._k), np.int32), np.arange(rows + 1))

    def remove(self) -> None:
        """There is nothing to look at."""


class LogitsTap:
    """Looks at the logits of every step of the model runner in this process, until `remove`.

    Args:
        k: likeliest tokens to keep a position.

    Attributes:
        errors: steps that could not be looked at; the first is logged.

    Raises:
        UnsupportedError: this vLLM's model runner is not as expected.
    """

    def __init__(self, k: int) -> None:
        self._k = k
        self._seen: tuple[Any, Int64] | None = None
        self.errors = 0
        self._runner = _model_runner()
        self._sample = sample = self._runner._sample
        self._removed = False

        @functools.wraps(sample)
        def look_and_sample(this: Any, logits: Any, spec_decode_metadata: Any, *args: Any, **kwargs: Any) -> Any:
            if not self._removed:
                self._look(logits, spec_decode_metadata)
            return sample(this, logits, spec_decode_metadata, *args, **kwargs)

        self._runner._sample = self._tapped = look_and_sample

    def remove(self) -> None:
        """Put the method back that was there before; where another tap came after this one, only stop looking."""
        self._removed = True
        if self._runner._sample is self._tapped:
            self._runner._sample = self._sample

    def take(self, rows: int) -> Ranked | None:
        """As `RankingSource.take`; waits for the device, after vLLM has."""
        seen, self._seen = self._seen, None
        if seen is None or len(seen[1]) != rows + 1:
            return None
        top_k, offsets = seen
        try:
            return Ranked(np.ascontiguousarray(top_k.cpu().numpy(), np.int32), offsets)
        except Exception:
            self._failed()
            return None

    def _look(self, logits: Any, metadata: Any) -> None:
        self._seen = None
        try:
            drafted = [0] * len(logits) if metadata is None else metadata.num_draft_tokens
            offsets = np.zeros(len(drafted) + 1, np.int64)
            np.cumsum(np.asarray(drafted, np.int64) + 1, out=offsets[1:])
            if offsets[-1] == len(logits):
                # A few numbers a position, and no wait for the device: `take` comes after vLLM's own.
                self._seen = logits.topk(self._k, dim=-1).indices, offsets
        except Exception:
            self._failed()

    def _failed(self) -> None:
        if not self.errors:
            logger.exception("freedraft: the target's rankings can't be read; drafting goes on without (logged once)")
        self.errors += 1


def _model_runner() -> Any:
    try:
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        if not callable(GPUModelRunner._sample):
            raise AttributeError("_sample is no method")
    except (ImportError, AttributeError) as error:
        raise UnsupportedError(f"this vLLM's model runner has no method _sample to read logits at: {error}") from error
    return GPUModelRunner
