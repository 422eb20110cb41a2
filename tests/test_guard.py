"""The guard: whatever a drafter does, the runtime gets an answer that keeps the contract."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Sequence
from typing import Any, ClassVar

import drafters
import numpy as np
import pytest

from freedraft.integrations.guard import Guard
from freedraft.plugins.base import Drafter, Drafts, Feedback
from freedraft.retrieval.errors import InputError
from freedraft.retrieval.ragged import Int64, ragged


def slots_of(*values: int) -> Int64:
    return np.array(values, np.int64)


def budget_of(*values: int) -> Any:
    return np.array(values, np.int32)


def rows_of(drafts: Drafts) -> list[list[int]]:
    return [drafts.tokens[drafts.row(i)].tolist() for i in range(drafts.rows)]


def ends_with(length: int) -> drafters.Scripted:
    """Drafts the text's last token, `length` times."""
    return drafters.Scripted(lambda text, budget: text[-1:] * min(length, budget))


def test_a_guard_is_a_drafter() -> None:
    assert isinstance(drafters.never(), Drafter)
    for method in ("open", "extend", "draft", "observe", "close", "feedback"):
        assert hasattr(Guard(drafters.never()), method)


def test_a_sound_drafter_passes_through() -> None:
    inner = ends_with(2)
    guard = Guard(inner)
    slots = guard.open(*ragged([[1, 2], [3], []]))
    assert slots.dtype == np.int64
    assert rows_of(guard.draft(slots, budget_of(5, 1, 5))) == [[2, 2], [3], []]
    guard.extend(slots, *ragged([[4], [], [5, 6]]))
    assert rows_of(guard.draft(slots, budget_of(0, 5, 5))) == [[], [3, 3], [6, 6]]
    # Some of them, in another order.
    assert rows_of(guard.draft(slots[[2, 0]], budget_of(1, 5))) == [[6], [4, 4]]
    guard.close(slots[:1])
    assert inner.closed == [[1, 2, 4]]
    assert guard.errors == 0


def test_slots_are_reused_and_never_shared() -> None:
    guard = Guard(ends_with(1))
    live: dict[int, int] = {}
    dice = random.Random(0)
    for token in range(300):
        if live and dice.random() < 0.45:
            slot = dice.choice(sorted(live))
            guard.close(slots_of(slot))
            del live[slot]
        else:
            (slot,) = guard.open(*ragged([[token]])).tolist()
            assert slot not in live
            live[slot] = token
        slots = slots_of(*live)
        assert rows_of(guard.draft(slots, budget_of(*[1] * len(live)))) == [[t] for t in live.values()]
    assert len(guard._inner) <= 128


def test_a_failed_open_retires_the_slots() -> None:
    guard = Guard(drafters.Raising(ends_with(1), 1.0, spared=("draft", "extend", "close")))
    slots = guard.open(*ragged([[1], [2]]))
    assert guard.retired(slots).tolist() == [True, True]
    assert rows_of(guard.draft(slots, budget_of(3, 3))) == [[], []]
    guard.extend(slots, *ragged([[3], [4]]))
    guard.close(slots)
    assert guard.errors == 1


class FailsFor(drafters.Scripted):
    """Raises in `extend` when it is told of token 13."""

    def extend(self, slots: Any, tokens: Any, offsets: Any) -> None:
        if 13 in tokens:
            raise RuntimeError("on purpose")
        super().extend(slots, tokens, offsets)


def test_a_failed_extend_retires_its_slots_and_no_others() -> None:
    inner = FailsFor(ends_with(2).propose)
    guard = Guard(inner)
    slots = guard.open(*ragged([[1], [2], [3]]))
    guard.extend(slots[[1]], *ragged([[13]]))
    assert guard.retired(slots).tolist() == [False, True, False]
    # The drafter is told that the sequence is over.
    assert inner.closed == [[2]]
    assert rows_of(guard.draft(slots, budget_of(9, 9, 1))) == [[1, 1], [], [3]]
    # A retired row's tokens are left out.
    guard.extend(slots, *ragged([[4, 5], [13, 13, 13], [6]]))
    assert rows_of(guard.draft(slots, budget_of(9, 9, 9))) == [[5, 5], [], [6, 6]]
    guard.extend(slots, *ragged([[], [7], []]))
    assert guard.errors == 1
    guard.close(slots)
    assert sorted(inner.closed) == [[1, 4, 5], [2], [3, 6]]
    # Opened anew, it works.
    again = guard.open(*ragged([[8]]))
    assert rows_of(guard.draft(again, budget_of(1))) == [[8]]


def test_a_failed_draft_retires_nothing() -> None:
    inner = drafters.Raising(ends_with(1), 0.5, spared=("open", "extend", "close"))
    guard = Guard(inner)
    slots = guard.open(*ragged([[1]]))
    answers = [rows_of(guard.draft(slots, budget_of(1))) for _ in range(50)]
    assert answers.count([[]]) == guard.errors == inner.raised
    assert answers.count([[1]]) == 50 - guard.errors > 0
    assert not guard.retired(slots).any()


def test_a_slot_that_is_given_twice_is_closed_once() -> None:
    guard = Guard(ends_with(1))
    slots = guard.open(*ragged([[1], [2]]))
    guard.close(slots[[0, 0]])
    again = guard.open(*ragged([[3], [4]]))
    assert len({*again.tolist(), int(slots[1])}) == 3
    assert guard.errors == 0


def test_a_failed_close_is_survived() -> None:
    guard = Guard(drafters.Raising(ends_with(1), 1.0, spared=("open", "draft", "extend")))
    slots = guard.open(*ragged([[1]]))
    guard.close(slots)
    assert guard.errors == 1
    assert rows_of(guard.draft(guard.open(*ragged([[2]])), budget_of(1))) == [[2]]


class Listening(drafters.Scripted):
    feedback: ClassVar[frozenset[Any]] = frozenset({"accepted"})

    def observe(self, slots: Any, feedback: Feedback) -> None:
        super().observe(slots, feedback)
        if feedback.accepted[0] == 13:
            raise RuntimeError("on purpose")


def feedback(*accepted: int) -> Feedback:
    return Feedback(np.array(accepted, np.int32), np.arange(len(accepted) + 1))


def test_observe() -> None:
    inner = Listening(ends_with(1).propose)
    guard = Guard(inner)
    slots = guard.open(*ragged([[1], [2]]))
    guard.observe(slots, feedback(1, 0))
    assert [method for method, _ in inner.calls] == ["open", "observe"]
    guard.observe(slots, feedback(13, 0))
    assert guard.errors == 1
    assert not guard.retired(slots).any()


def test_what_concerns_a_lost_sequence_is_left_out() -> None:
    class Asking(FailsFor):
        feedback: ClassVar[frozenset[Any]] = frozenset({"accepted", "argmax", "top_k"})

        def end_reply(self, slots: Any) -> None:
            self.calls.append(("end_reply", slots.tolist()))

    inner = Asking(ends_with(2).propose)
    guard = Guard(inner)
    slots = guard.open(*ragged([[1], [2], [3]]))
    guard.extend(slots[[1]], *ragged([[13]]))
    rankings = np.arange(12, dtype=np.int32).reshape(6, 2)
    told = Feedback(np.array([0, 1, 2], np.int32), np.array([0, 1, 3, 6]), rankings[:, 0].copy(), rankings)
    guard.observe(slots, told)
    (seen,) = (details for method, details in inner.calls if method == "observe")
    assert seen.accepted.tolist() == [0, 2]
    assert seen.offsets.tolist() == [0, 1, 4]
    assert seen.argmax.tolist() == [0, 6, 8, 10]
    assert seen.top_k.tolist() == [[0, 1], [6, 7], [8, 9], [10, 11]]
    guard.end_reply(slots)
    assert inner.calls[-1] == ("end_reply", [7, 9])
    guard.observe(slots[[1]], Feedback(np.array([0], np.int32), np.array([0, 1])))
    guard.end_reply(slots[[1]])
    assert inner.calls[-1] == ("end_reply", [7, 9])


def test_a_drafter_that_wants_no_feedback_is_not_told() -> None:
    inner = ends_with(1)
    guard = Guard(inner)
    guard.observe(guard.open(*ragged([[1]])), feedback(1))
    assert [method for method, _ in inner.calls] == ["open"]


@pytest.mark.parametrize("kind", drafters.MALFORMED)
def test_malformed_drafts(kind: str) -> None:
    guard = Guard(drafters.Malformed(drafters.MALFORMED[kind]))
    slots = guard.open(*ragged([[1]]))
    assert rows_of(guard.draft(slots, budget_of(4), vocabulary=100)) == [[]]
    assert guard.errors == 1
    assert not guard.retired(slots).any()


def test_a_row_beyond_its_own_budget() -> None:
    guard = Guard(drafters.Scripted(lambda text, budget: [1, 2]))
    slots = guard.open(*ragged([[1], [1]]))
    assert rows_of(guard.draft(slots, budget_of(2, 2))) == [[1, 2], [1, 2]]
    # The sum would fit.
    assert rows_of(guard.draft(slots, budget_of(3, 1))) == [[], []]
    assert guard.errors == 1


def test_a_row_with_a_token_beyond_the_vocabulary_gets_no_draft_and_the_others_keep_theirs() -> None:
    guard = Guard(drafters.Scripted(lambda text, budget: text[:budget]))
    slots = guard.open(*ragged([[1, 2], [3, 100, 4], [5]]))
    assert rows_of(guard.draft(slots, budget_of(4, 4, 4), vocabulary=100)) == [[1, 2], [], [5]]
    # A prompt may have such tokens: the drafter did nothing wrong.
    assert guard.errors == 0


def test_the_last_token_of_the_vocabulary_may_be_drafted() -> None:
    guard = Guard(drafters.Scripted(lambda text, budget: [99]))
    slots = guard.open(*ragged([[1]]))
    assert rows_of(guard.draft(slots, budget_of(1), vocabulary=100)) == [[99]]
    assert rows_of(guard.draft(slots, budget_of(1), vocabulary=99)) == [[]]
    assert rows_of(guard.draft(slots, budget_of(1))) == [[99]]


def tree(parents: Sequence[Sequence[int]]) -> Any:
    """A drafter of one tree a row."""

    class Growing(drafters.Scripted):
        def draft(self, slots: Any, budget: Any) -> Drafts:
            flat = [parent for row in parents for parent in row]
            offsets = np.concatenate([[0], np.cumsum([len(row) for row in parents])]).astype(np.int64)
            size = len(flat)
            return Drafts(
                np.arange(size, dtype=np.int32),
                np.array(flat, np.int32),
                np.ones(size, np.float32),
                np.zeros(size, np.uint8),
                offsets,
            )

    return Growing()


@pytest.mark.parametrize(
    ("parents", "sound"),
    [
        ([[-1, 0, 1], [-1, 0]], True),
        ([[-1, -1, 0, 0, 1], [-1]], True),
        ([[-1], [-1, -1, -1]], True),
        # Parents are counted within the row: 1 in the second row is its own second node, not listed before it.
        ([[-1, 0], [-1, 1]], False),
        ([[-1, 0], [0]], False),
        ([[-1, 2, 0], []], False),
    ],
)
def test_parents_come_first(parents: list[list[int]], sound: bool) -> None:
    guard = Guard(tree(parents))
    slots = guard.open(*ragged([[1], [2]]))
    assert bool(len(guard.draft(slots, budget_of(9, 9)).tokens)) == sound
    assert guard.errors == (not sound)


@pytest.mark.parametrize("shape", [(3, 1), (3, 2), (1, 3)])
def test_drafts_of_another_shape(shape: tuple[int, int]) -> None:
    class Wrong(drafters.Scripted):
        def draft(self, slots: Any, budget: Any) -> Drafts:
            flat = [np.zeros(shape, kind) for kind in (np.int32, np.int32, np.float32, np.uint8)]
            return Drafts(*flat, np.array([0, shape[0]]))

    guard = Guard(Wrong())
    assert rows_of(guard.draft(guard.open(*ragged([[1]])), budget_of(9))) == [[]]
    assert guard.errors == 1


def test_offsets_that_fall() -> None:
    class Wrong(drafters.Scripted):
        def draft(self, slots: Any, budget: Any) -> Drafts:
            size = 4
            flat = [np.zeros(size, kind) for kind in (np.int32, np.int32, np.float32, np.uint8)]
            flat[1][:] = -1
            return Drafts(*flat, np.array([0, 3, 1, 4]))

    guard = Guard(Wrong())
    assert rows_of(guard.draft(guard.open(*ragged([[1], [2], [3]])), budget_of(9, 9, 9))) == [[], [], []]
    assert guard.errors == 1


@pytest.mark.parametrize("wanted", ["x", -1, 0, 2.5])
def test_feedback_of_no_size(wanted: Any) -> None:
    inner = drafters.never()
    inner.feedback_top_k = wanted
    with pytest.raises(InputError, match="feedback_top_k"):
        Guard(inner)


@pytest.mark.parametrize("drafter", [drafters.Scripted, 3, None])
def test_what_is_no_drafter(drafter: Any) -> None:
    with pytest.raises(InputError, match="Drafter"):
        Guard(drafter)


def test_closing_twice_frees_once() -> None:
    guard = Guard(drafters.never())
    slots = guard.open(*ragged([[1]]))
    guard.close(slots)
    guard.close(slots)
    assert len(set(guard.open(*ragged([[1], [2]])).tolist())) == 2


@pytest.mark.parametrize("answer", [None, [1], np.array([1, 2, 3]), np.array([-4, 1]), np.array([0.5, 1.5])])
def test_malformed_slots(answer: Any) -> None:
    class Wrong(drafters.Scripted):
        def open(self, prompts: Any, offsets: Any) -> Any:
            return answer

    guard = Guard(Wrong())
    slots = guard.open(*ragged([[1], [2]]))
    assert guard.retired(slots).tolist() == [True, True]
    assert guard.errors == 1


def test_the_first_failure_is_logged_and_only_that(caplog: pytest.LogCaptureFixture) -> None:
    guard = Guard(drafters.Raising(ends_with(1), 1.0, spared=("open",)))
    slots = guard.open(*ragged([[1]]))
    with caplog.at_level(logging.ERROR, logger="freedraft"):
        for _ in range(3):
            guard.draft(slots, budget_of(1))
    (record,) = caplog.records
    assert "decoding goes on without its drafts" in record.message
    assert record.exc_info is not None
    assert "draft failed on purpose" in str(record.exc_info[1])
    assert guard.errors == 3


def test_an_interrupt_is_not_swallowed() -> None:
    def interrupted(text: list[int], budget: int) -> list[int]:
        raise KeyboardInterrupt

    guard = Guard(drafters.Scripted(interrupted))
    with pytest.raises(KeyboardInterrupt):
        guard.draft(guard.open(*ragged([[1]])), budget_of(1))
    # And the lock is free again.
    assert guard._lock.acquire(blocking=False)


def test_a_drafter_is_never_called_by_two_threads_at_once() -> None:
    busy = threading.Lock()
    meetings = []

    def propose(text: list[int], budget: int) -> list[int]:
        if not busy.acquire(blocking=False):
            meetings.append(text)
            return []
        sum(range(2000))
        busy.release()
        return []

    guard = Guard(drafters.Scripted(propose))

    def work(token: int) -> None:
        for _ in range(200):
            slots = guard.open(*ragged([[token]]))
            guard.draft(slots, budget_of(1))
            guard.close(slots)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert meetings == []
    assert guard.errors == 0
    assert len(guard._inner) == 16
