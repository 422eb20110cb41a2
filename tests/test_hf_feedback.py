"""Feedback is in the numbering of the drafter's own draft, whatever of it was verified."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import torch

from freedraft.integrations.hf import Speculative, target
from freedraft.integrations.hf.draft import as_draft, shaped
from freedraft.integrations.hf.feedback import of_all_nodes
from freedraft.plugins.base import Drafts, Feedback
from freedraft.plugins.branches import likeliest_chains
from freedraft.plugins.token_recycling import TokenRecycling, TokenRecyclingSettings
from freedraft.retrieval.ragged import Int64

one_thread = tiny.one_thread

# Row 1 of these: 0 -> 5 -> (6, 7 -> 8), 0 -> 9.
ASKED = Drafts(
    np.array([1, 5, 6, 7, 9, 8], np.int32),
    np.array([-1, -1, 0, 0, -1, 2], np.int32),
    np.array([0.5, 0.9, 0.3, 0.5, 0.1, 0.4], np.float32),
    np.zeros(6, np.uint8),
    np.array([0, 1, 6]),
)


def feedback(*argmax: int) -> Feedback:
    ids = np.array(argmax, np.int32)
    return Feedback(np.array([1], np.int32), np.array([0, len(ids)]), ids, np.stack([ids, ids + 1], axis=1))


def test_a_whole_draft_is_told_as_it_is() -> None:
    told = feedback(10, 11, 12, 13, 14, 15)
    assert of_all_nodes(told, as_draft(ASKED, 1), ASKED, 1) is told


def test_a_branch_of_a_tree() -> None:
    cut = likeliest_chains(ASKED)[0]
    told = of_all_nodes(feedback(10, 11, 12, 13), as_draft(cut, 1), ASKED, 1)
    assert told.offsets.tolist() == [0, 6]
    assert told.argmax is not None
    assert told.top_k is not None
    assert told.argmax.tolist() == [10, 11, -1, 12, -1, 13]
    assert told.top_k.tolist() == [[10, 11], [11, 12], [-1, -1], [12, 13], [-1, -1], [13, 14]]


def test_nodes_listed_in_another_order_and_none_at_all() -> None:
    told = of_all_nodes(feedback(10, 11, 12), shaped([9, 5], [0, 0]), ASKED, 1)
    assert told.argmax is not None
    assert told.argmax.tolist() == [10, 12, -1, -1, 11, -1]
    told = of_all_nodes(feedback(10), shaped([], []), ASKED, 1)
    assert told.argmax is not None
    assert told.argmax.tolist() == [10, -1, -1, -1, -1, -1]


def test_siblings_with_the_same_token_are_told_the_same() -> None:
    # 0 -> 5 -> 6 and 0 -> 5 -> 7.
    asked = Drafts(
        np.array([5, 5, 6, 7], np.int32),
        np.array([-1, -1, 0, 1], np.int32),
        np.full(4, 0.5, np.float32),
        np.zeros(4, np.uint8),
        np.array([0, 4]),
    )
    told = of_all_nodes(feedback(10, 11, 12, 13), shaped([5, 5, 7], [0, 0, 2]), asked, 0)
    assert told.argmax is not None
    assert told.argmax[[0, 3, 4]].tolist() == [10, -1, 13]
    assert told.argmax[1] == told.argmax[2]
    assert told.argmax[1] in (11, 12)
    told = of_all_nodes(feedback(10, 11), shaped([5], [0]), asked, 0)
    assert told.argmax is not None
    assert told.argmax.tolist() == [10, 11, 11, -1, -1]


class Checked(TokenRecycling):
    """Checks what it is told against the model itself."""

    model: Any
    text: list[int]
    partly = 0

    def open(self, prompts: Any, offsets: Int64) -> Int64:
        self.text = []
        slots = super().open(prompts, offsets)
        self.text = prompts.tolist()
        return slots

    def extend(self, slots: Int64, tokens: Any, offsets: Int64) -> None:
        super().extend(slots, tokens, offsets)
        self.text += tokens.tolist()

    def draft(self, slots: Int64, budget: Any) -> Drafts:
        self.last = super().draft(slots, budget)
        return self.last

    def observe(self, slots: Int64, feedback: Feedback) -> None:
        assert feedback.top_k is not None
        nodes = len(self.last.tokens)
        assert feedback.offsets.tolist() == [0, 1 + nodes]
        paths = [list(self.text)]
        for token, parent in zip(self.last.tokens.tolist(), self.last.parents.tolist(), strict=True):
            paths.append([*paths[1 + parent], token])
        shown = [i for i, row in enumerate(feedback.top_k.tolist()) if row[0] != -1]
        assert shown[0] == 0
        for i in shown:
            best = self.model(torch.tensor([paths[i]])).logits[0, -1].argmax()
            assert feedback.top_k[i, 0] == best
        Checked.partly += 0 < len(shown) - 1 < nodes
        super().observe(slots, feedback)


@pytest.mark.parametrize("how", ["paced", "chains", "cut at ends"])
def test_what_is_told_is_true_of_the_drafters_nodes(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    which, ids = tiny.model(), tiny.prompt(40) % 6 + 20
    drafter = Checked(TokenRecyclingSettings(max_tokens=20, min_probability=0.01))
    drafter.model, Checked.partly = which, 0
    ours = Speculative(drafter, pacing={"explore": 2} if how == "paced" else "off")
    if how == "chains":
        monkeypatch.setattr(target, "why_no_masks", lambda *_: "a test says so")
    options: dict[str, Any] = {"max_new_tokens": 40}
    if how == "cut at ends":
        written = set(tiny.plain(which, ids, **options)[0].tolist())
        options["eos_token_id"] = [token for token in range(tiny.VOCABULARY) if token not in written]
    assert tiny.speculative(which, ids, ours, **options).equal(tiny.plain(which, ids, **options))
    assert ours.statistics is not None
    assert ours.statistics.drafter_errors == 0
    assert Checked.partly > 0
