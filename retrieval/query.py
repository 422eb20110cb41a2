"""What an index knows of how a text goes on: for people who ask why a draft is what it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from freedraft.retrieval.index.continuation import continue_one
from freedraft.retrieval.index.follow import (
    AT_LENGTH,
    AT_NODE,
    AT_TEXT,
    AT_TIMES,
    AT_USED,
    CURSOR_FIELDS,
    DAMAGED,
    Automaton,
    advance,
    context_count,
    likeliest_of,
)
from freedraft.retrieval.index.format import COUNT, DEGREE, EDGE_TIMES, EDGE_TOKEN, EDGES, TIMES, TOKEN
from freedraft.retrieval.index.segment import Segment
from freedraft.retrieval.index.validate import count_occurrences
from freedraft.retrieval.jit import kernel
from freedraft.retrieval.ragged import Float32, Int32, Int64

OCCURRENCES_LOOKED_AT = 10_000


@dataclass(frozen=True, slots=True)
class Continuation:
    """How a text goes on in the segments.

    Attributes:
        length: tokens of its longest suffix that a token follows somewhere; 0 = there is none.
        count: how often that suffix occurs with a token after it.
        tokens: those tokens and how often each followed, most often first, of equals the smallest id first.
    """

    length: int
    count: int
    tokens: list[tuple[int, int]]


class Follower:
    """Follows one text through segments, exactly, adding up what they say."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = segments
        self._cursors = [segment.new_cursors(1) for segment in segments]
        self._slots: Int64 = np.zeros(1, np.int64)

    def advance(self, tokens: Int32) -> None:
        """Append tokens to the text.

        Raises:
            DamagedError: a segment is damaged.
        """
        offsets = np.array([0, len(tokens)])
        for segment, cursors in zip(self._segments, self._cursors, strict=True):
            segment.advance(cursors, self._slots, tokens, offsets)

    def continuation(self) -> Continuation:
        """How the text goes on after its longest known suffix.

        Raises:
            DamagedError: a segment is damaged.
        """
        length = max((int(cursors[0, AT_LENGTH]) for cursors in self._cursors), default=0)
        count = 0
        followers: Counter[int] = Counter()
        if length > 0:
            for segment, cursors in zip(self._segments, self._cursors, strict=True):
                if cursors[0, AT_LENGTH] == length:
                    seen, after = _after(segment, cursors[0])
                    count += seen
                    followers.update(after)
        return Continuation(length, count, sorted(followers.items(), key=lambda item: (-item[1], item[0])))


@dataclass(frozen=True, slots=True)
class DraftedToken:
    """A token of a draft.

    Attributes:
        token: its id.
        length: tokens of the context that it was drafted from.
        times: how often it followed that context.
        count: how often that context occurs.
        probability: that it follows, and all drafted before it, by the drafter's estimate (`continuation`).
    """

    token: int
    length: int
    times: int
    count: int
    probability: float


def likeliest_draft(segments: Sequence[Segment], text: Int32, budget: int) -> list[DraftedToken]:
    """What would be drafted after a text, with no threshold: of the segments' drafts that which expects most.

    Raises:
        DamagedError: a segment is damaged.
    """
    best: list[DraftedToken] = []
    most = np.float32(0)
    for segment in segments:
        cursors = segment.new_cursors(1)
        segment.advance(cursors, np.zeros(1, np.int64), text, np.array([0, len(text)]))
        tokens, lengths, times, counts = (np.zeros(budget, np.int32) for _ in range(4))
        probability = np.zeros(budget, np.float32)
        written = draft_with_reasons(segment.automaton, cursors[0], tokens, probability, lengths, times, counts)
        if written < 0:
            raise segment.damaged()
        if probability.sum() > most:
            most = probability.sum()
            columns = (column[:written].tolist() for column in (tokens, lengths, times, counts, probability))
            best = [DraftedToken(*row) for row in zip(*columns, strict=True)]
    return best


@kernel
def draft_with_reasons(
    automaton: Automaton,
    cursor: Int32,
    tokens: Int32,
    probability: Float32,
    lengths: Int32,
    times: Int32,
    counts: Int32,
) -> int:
    """`continue_one`, and where it took each token from.

    Args:
        cursor: where the text is; moved.
        tokens: written from the left, with as many tokens as it has room for at most; so are all others.
        lengths: of each token's context; `times` that it followed, of `counts`.

    Returns:
        How many tokens; or -1 where the segment is damaged.
    """
    text, nodes, edges = automaton
    best = np.empty(CURSOR_FIELDS, np.int32)
    start = cursor.copy()
    written = continue_one(text, nodes, edges, start, best, len(tokens), 1, 0.0, tokens, probability)
    if written < 1:
        return written
    # With no budget it leaves the cursor at the context that it begins with.
    if continue_one(text, nodes, edges, cursor, best, 0, 1, 0.0, tokens, probability) < 0:
        return -1
    for i in range(written):
        _, times[i] = likeliest_of(text, nodes, cursor)
        lengths[i] = cursor[AT_LENGTH]
        counts[i] = context_count(nodes, cursor)
        # The automaton's links and positions are checked on the way, its counts are not.
        if not 1 <= times[i] <= counts[i] or advance(text, nodes, edges, cursor, tokens[i]) == DAMAGED:
            return -1
    return written


def documents_with(segments: Sequence[Segment], pattern: Int32) -> tuple[list[tuple[str, int]], bool]:
    """The names of the documents where `pattern` occurs with a token after it, and how often, most often first.

    Reads the whole text: about a nanosecond a token.

    Returns:
        The documents, and whether those are all: of very frequent patterns only the first `OCCURRENCES_LOOKED_AT`
        occurrences in each segment count.
    """
    found: Counter[str] = Counter()
    all_of_them = True
    for segment in segments:
        places = np.empty(OCCURRENCES_LOOKED_AT, np.int64)
        number = count_occurrences(segment.automaton.text, segment.starts, pattern, places)
        all_of_them &= number <= len(places)
        documents, times = np.unique(places[: min(number, len(places))], return_counts=True)
        for document, often in zip(documents.tolist(), times.tolist(), strict=True):
            found[segment.name(document)] += often
    return sorted(found.items(), key=lambda item: (-item[1], item[0])), all_of_them


def _after(segment: Segment, cursor: Int32) -> tuple[int, dict[int, int]]:
    """How often a cursor's context occurs, and each token after it with how often it does."""
    text, nodes, edges = segment.automaton
    if cursor[AT_USED] > 0:
        times = int(cursor[AT_TIMES])
        count, after = times, {int(text[cursor[AT_TEXT]]): times}
    else:
        row = [int(value) for value in nodes[cursor[AT_NODE]]]
        others = edges[row[EDGES] : row[EDGES] + row[DEGREE]]
        after = dict(zip(others[:, EDGE_TOKEN].tolist(), others[:, EDGE_TIMES].tolist(), strict=True))
        after[row[TOKEN]] = row[TIMES]
        count = row[COUNT]
    # The automaton's links and positions were checked on the way here, its counts were not.
    if min(after) < 0 or min(after.values()) < 1 or sum(after.values()) > count:
        raise segment.damaged()
    return count, after
