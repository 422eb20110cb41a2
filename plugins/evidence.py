"""Evidence for the next token: the nested contexts that end at a cursor in some text's automaton.

A cursor is a state and the number of tokens matched there. A sequence has one in its own text, where the automaton
keeps it, and one in every other text that it is followed through. A row of evidence is one context; its columns:
"""

from __future__ import annotations

import numpy as np

from freedraft.retrieval.contexts import likeliest_times
from freedraft.retrieval.edges import COUNT, LENGTH, LINK, NO_TOKEN, RECENT, TOKEN, find_edge
from freedraft.retrieval.growth import HEAD_LEARNING, HEAD_LENGTH, HEAD_ROOT, text_at
from freedraft.retrieval.jit import kernel
from freedraft.retrieval.ragged import MAX_TOKEN, Int32, Int64

KIND = 0  # what sort of text it is: an index of `KINDS`
MATCHED = 1  # tokens of the context
SEEN = 2  # how often it occurred
LIKELIEST = 3  # the token that followed most often
TIMES = 4  # how often that one followed
LATEST = 5  # the token that followed last
PLACE = 6  # the automaton's state; in a corpus the node, or `NO_STATE` on the way along an edge
TEXT = 7  # which corpus, if it is one; which row of the rankings; which other drafter
COLUMNS = 8

NO_STATE = -1

# Of its own text a sequence has two kinds: contexts that came within the latest `NEAR` tokens that it
# has learnt, and others.
OWN, RESPONSES, CORPUS, REFERENCE, OWN_FAR, RANKED, PROPOSED, INDIRECT = range(8)
KINDS = 8
COUNTED = RANKED  # of the kinds below it the counts are counts; in the others `TIMES` is a share bucket
SINGLE = PROPOSED  # from this kind on a row tells of one token alone
NEAR = 256

CONTEXTS_A_TEXT = 3
MAX_CONTEXTS = 32

# A cursor in another text matches no more of a sequence's tokens than this, so that it depends on these alone.
REACH = 64

# Divides texts that share an automaton; no model's vocabulary has it, and it is never drafted.
SEPARATOR = MAX_TOKEN


@kernel
def advance(
    words: Int32, states: Int32, edges: Int32, root: int, state: int, matched: int, token: int
) -> tuple[int, int]:
    """The cursor after `token`: the longest suffix that the text holds with a continuation. O(1) amortised."""
    while state != 0:
        target = find_edge(words, states, edges, state, token)
        if target != 0:
            state = target
            matched += 1
            break
        state = states[state, LINK]
        matched = states[state, LENGTH]
    while state != 0 and states[state, TOKEN] == NO_TOKEN:
        state = states[state, LINK]
        matched = states[state, LENGTH]
    if state == 0:
        return root, 0
    return state, matched


@kernel
def settle(states: Int32, state: int, matched: int) -> int:
    """The state where `matched` tokens are, after the text has grown: a growing text splits states in two."""
    while states[state, LINK] != 0 and matched <= states[states[state, LINK], LENGTH]:
        state = states[state, LINK]
    return state


@kernel
def follow(
    words: Int32, states: Int32, edges: Int32, root: int, state: int, matched: int, token: int
) -> tuple[int, int]:
    """As `advance`, in another text than the sequence's own: no further back than `REACH`."""
    state, matched = advance(words, states, edges, root, state, matched, token)
    if matched > REACH:
        return settle(states, state, REACH), REACH
    return state, matched


@kernel
def find_end(words: Int32, states: Int32, edges: Int32, own: Int32, root: int) -> tuple[int, int]:
    """The cursor in another text, whose root is given, behind the end of a sequence's own text. O(`REACH`)."""
    state, matched = root, 0
    if own[HEAD_LEARNING] != 0:
        for position in range(max(0, own[HEAD_LENGTH] - REACH), own[HEAD_LENGTH]):
            state, matched = follow(words, states, edges, root, state, matched, text_at(words, own, position))
    return state, matched


@kernel
def gather(
    words: Int32, states: Int32, header: Int32, kind: int, state: int, matched: int, evidence: Int64, rows: int
) -> int:
    """Add the longest contexts at a cursor to `evidence`, after its first `rows`; return how many rows there are."""
    end = min(rows + CONTEXTS_A_TEXT, len(evidence))
    while matched > 0 and rows < end:
        seen = states[state, COUNT]
        if seen > 0:
            evidence[rows, KIND] = kind
            evidence[rows, MATCHED] = matched
            evidence[rows, SEEN] = seen
            evidence[rows, LIKELIEST] = states[state, TOKEN]
            evidence[rows, TIMES] = likeliest_times(states, header, state)
            # Replies are strands of their automaton, where it holds the token itself.
            latest = states[state, RECENT]
            evidence[rows, LATEST] = latest if kind == RESPONSES else text_at(words, header, latest + 1)
            evidence[rows, PLACE] = state
            rows += 1
        state = states[state, LINK]
        matched = states[state, LENGTH]
    return rows


@kernel
def times_of(words: Int32, states: Int32, edges: Int32, context: Int64, token: int) -> int:
    """How often `token` followed a context, one row of evidence."""
    if context[LIKELIEST] == token:
        return context[TIMES]
    if context[TIMES] == context[SEEN]:
        return 0
    target = find_edge(words, states, edges, context[PLACE], token)
    # A count of 0 there stands for the occurrence that ends the text, which is not counted yet.
    return 0 if target == 0 else max(1, states[target, COUNT])


@kernel
def count_single(evidence: Int64, rows: int, tokens: Int64, times: Int64) -> None:
    """Fill `times[j, i]`, int64 `(tokens, MAX_CONTEXTS)`, where row i tells of one token: its share bucket, or 0."""
    for i in range(rows):
        if evidence[i, KIND] >= SINGLE:
            for j in range(len(tokens)):
                times[j, i] = evidence[i, TIMES] if tokens[j] == evidence[i, LIKELIEST] else 0


@kernel
def root_of(sequences: Int32, slot: int) -> int:
    """The state of the empty context of a text."""
    return sequences[slot, HEAD_ROOT]


def empty_evidence() -> Int64:
    """Room for the contexts of one position; int64 `(MAX_CONTEXTS, COLUMNS)`."""
    return np.zeros((MAX_CONTEXTS, COLUMNS), np.int64)
