"""What follows a follower, as evidence: the indirect contexts of PAQ-style compressors (Mahoney, paq8).

Counts foresee what was there before. But lists are numbered, and rows and keys come in an order: where "1" followed a
context last time, "2" follows it now, though it never did. So where the longest context of a sequence's own text was
followed by one token last time and by another now, in its reply, a table keeps that pair, whatever the context; and
where the last follower of the longest context has such a successor, that one is a candidate.

The table is int32 `(ENTRIES, FIELDS)`. Tokens that share an entry displace one another, at once where they are not of
one owner. An entry is everybody's or one sequence's alone, by its owner's number (`adjacency.owners`), as `scope` has
it.
"""

from __future__ import annotations

import numpy as np

from freedraft.plugins.evidence import (
    INDIRECT,
    KIND,
    LATEST,
    LIKELIEST,
    MATCHED,
    NO_STATE,
    OWN,
    OWN_FAR,
    PLACE,
    SEEN,
    TEXT,
    TIMES,
)
from freedraft.plugins.mixing import SHARE_BUCKETS
from freedraft.retrieval.jit import kernel
from freedraft.retrieval.ragged import Int32, Int64

ENTRIES = 4096
OWNERS_APART = 40503  # entries between those of two owners, for one token

# Fields of an entry.
OWNER = 0
FOLLOWER = 1
SUCCESSOR = 2
TRUST = 3  # how often it came, less how often another did; 0 = the entry is free
FIELDS = 4

MAX_TRUST = 60
LENGTHS_AS_ONE = 4  # about so many lengths of the context share what is learnt of them, more from 24 up
LONGEST = 40


def no_successors() -> Int32:
    """A table of nothing."""
    return np.zeros((ENTRIES, FIELDS), np.int32)


@kernel
def follower(evidence: Int64, rows: int) -> int:
    """The last follower of the longest context of the own text, which comes first in `evidence`; -1 = none."""
    if rows > 0 and (evidence[0, KIND] == OWN or evidence[0, KIND] == OWN_FAR):
        return int(evidence[0, LATEST])
    return -1


@kernel
def entry_of(successors: Int32, owner: int, token: int) -> Int32:
    """The entry that a token of this owner's has, or shares."""
    return successors[(token + OWNERS_APART * owner) & (ENTRIES - 1)]


@kernel
def gather_indirect(successors: Int32, owner: int, evidence: Int64, rows: int) -> int:
    """Add the successor of the last follower to `evidence`, after its first `rows`; return how many rows there are."""
    before = follower(evidence, rows)
    if before < 0 or rows == len(evidence):
        return rows
    entry = entry_of(successors, owner, before)
    if entry[TRUST] == 0 or entry[FOLLOWER] != before or entry[OWNER] != owner:
        return rows
    evidence[rows, KIND] = INDIRECT
    evidence[rows, MATCHED] = 1 + min(evidence[0, MATCHED], LONGEST) // LENGTHS_AS_ONE
    evidence[rows, SEEN] = entry[TRUST]
    evidence[rows, LIKELIEST] = entry[SUCCESSOR]
    evidence[rows, TIMES] = SHARE_BUCKETS - 1
    evidence[rows, LATEST] = -1
    evidence[rows, PLACE] = NO_STATE
    evidence[rows, TEXT] = 0
    return rows + 1


@kernel
def learn_indirect(successors: Int32, owner: int, evidence: Int64, rows: int, token: int) -> None:
    """Take in that `token` was committed where `evidence` is the evidence."""
    before = follower(evidence, rows)
    if before < 0 or before == token:
        return
    entry = entry_of(successors, owner, before)
    own = entry[TRUST] > 0 and entry[OWNER] == owner
    if own and entry[FOLLOWER] == before and entry[SUCCESSOR] == token:
        entry[TRUST] = min(entry[TRUST] + 1, MAX_TRUST)
    elif own and entry[TRUST] > 1:
        entry[TRUST] -= 1
    else:
        entry[OWNER], entry[FOLLOWER], entry[SUCCESSOR], entry[TRUST] = owner, before, token, 1
