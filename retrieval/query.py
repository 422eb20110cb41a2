"""What an index knows of how a text goes on: for people who ask why a draft is what it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from freedraft.retrieval.index.follow import AT_LENGTH, AT_NODE, AT_TEXT, AT_TIMES, AT_USED
from freedraft.retrieval.index.format import COUNT, DEGREE, EDGE_TIMES, EDGE_TOKEN, EDGES, TIMES, TOKEN
from freedraft.retrieval.index.segment import Segment
from freedraft.retrieval.index.validate import count_occurrences
from freedraft.retrieval.ragged import Int32, Int64

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
        probability: that it follows, and all drafted before it.
    """

    token: int
    length: int
    times: int
    count: int
    probability: float


def greedy_draft(segments: Sequence[Segment], text: Int32, budget: int) -> list[DraftedToken]:
    """The likeliest next tokens, one after another, each by the longest context known then."""
    follower = Follower(segments)
    follower.advance(text)
    drafted: list[DraftedToken] = []
    probability = 1.0
    while len(drafted) < budget:
        known = follower.continuation()
        if not known.tokens:
            break
        token, times = known.tokens[0]
        probability *= times / known.count
        drafted.append(DraftedToken(token, known.length, times, known.count, probability))
        follower.advance(np.array([token], np.int32))
    return drafted


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
