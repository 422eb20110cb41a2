"""What the proposer reads of vLLM, without vLLM: its configuration and its rows."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from drafters import Scripted

from freedraft.integrations.vllm import Proposer, metrics, proposer
from freedraft.plugins.config import ENVIRONMENT_VARIABLE

ROWS, WIDTH, VOCABULARY, LONGEST = 4, 64, 1000, 5
OUTSIDE = (ENVIRONMENT_VARIABLE, metrics.OWN_FOLDER, metrics.VLLM_FOLDER)


def vllm_config(freedraft: Any = None, **model: Any) -> Any:
    """What the proposer reads of vLLM's configuration."""
    return SimpleNamespace(
        model_config=SimpleNamespace(
            max_model_len=WIDTH, get_vocab_size=lambda: VOCABULARY, served_model_name="smol", **model
        ),
        speculative_config=SimpleNamespace(num_speculative_tokens=LONGEST),
        scheduler_config=SimpleNamespace(max_num_seqs=ROWS),
        parallel_config=SimpleNamespace(
            data_parallel_index=0,
            tensor_parallel_size=1,
            pipeline_parallel_size=1,
            distributed_executor_backend="uni",
        ),
        additional_config={} if freedraft is None else {"freedraft": freedraft},
    )


def with_drafter(monkeypatch: pytest.MonkeyPatch, drafter: Any, freedraft: Any = None) -> Proposer:
    """A proposer over this drafter; its rehearsal gets another."""
    made = iter([drafter, Scripted()])
    monkeypatch.setattr(proposer, "drafter_from_config", lambda config, rehearsing=False: next(made))
    return Proposer(vllm_config(freedraft))


def metrics_written(asked: Proposer) -> None:
    """Wait until the metrics are those of now, which is not long."""
    deadline = time.monotonic() + 30
    assert asked._metrics is not None
    while asked._metrics._written != (asked.statistics.steps, asked.statistics.seconds):
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Batch:
    """Rows of text, as vLLM holds them."""

    def __init__(self, *texts: list[int]) -> None:
        self.texts = [list(text) for text in texts]
        self.tokens = np.full((ROWS, WIDTH), 999, np.int32)
        self.length = np.full(ROWS, WIDTH, np.int32)

    def commit(self, to: Proposer, *new: list[int], slot_mappings: Any = None) -> list[list[int]]:
        for i, tokens in enumerate(new):
            self.texts[i] += tokens
            self.length[i] = len(self.texts[i])
            self.tokens[i, : self.length[i]] = self.texts[i]
        before = self.tokens.copy()
        drafts = to.propose(list(new), self.length, self.tokens, slot_mappings=slot_mappings)
        np.testing.assert_array_equal(self.tokens, before)
        assert type(drafts) is list
        assert len(drafts) == len(new)
        for row, draft in zip(new, drafts, strict=True):
            assert type(draft) is list
            assert all(type(token) is int for token in draft)
            assert len(draft) <= LONGEST
            assert row or not draft
        return drafts
