"""The out-edges of one automaton state: token -> target state.

Most states have one edge: it lies in the state itself (`TOKEN`, `TARGET`), and there is no edge set. A state with two
or more has a set that holds all of them, and its inline edge is a copy of the likeliest. A set is named by a reference:
`unit << 2 | kind`, 0 = none. Kinds 0, 1 and 2 are leaves of 2, 4 and 8 edges, in order of insertion, filled up with
`NO_TOKEN`. Kind 3 is an index node: 16 references, chosen by four bits of the token's hash, as in a hash array mapped
trie (Bagwell 2001, "Ideal Hash Trees"). The thousands of edges of the root are three nodes deep, and no table is ever
rehashed.
"""

from __future__ import annotations

import numpy as np

from freedraft.retrieval.jit import kernel
from freedraft.retrieval.memory import RANK_64, UNIT_WORDS, allocate, free
from freedraft.retrieval.ragged import Int32

# Fields of a state, one int32 each.
LENGTH = 0  # tokens of its longest string
LINK = 1  # suffix link: the state of the longest proper suffix that is not in this state; 0 above the root
COUNT = 2  # occurrences whose next token is known
RECENT = 3  # position of the last token of the most recent of those occurrences; of strands, the token behind it
TOKEN = 4  # inline edge: the likeliest next token (ties: the most recent), NO_TOKEN = no edge at all
TARGET = 5
ORIGIN = 6  # position of the last token of the first occurrence << BEST_BITS | occurrences of TOKEN, saturated
EDGES = 7  # reference of the edge set, 0 while there are fewer than two edges
STATE_WORDS = 8

BEST_BITS = 8
BEST_MAX = (1 << BEST_BITS) - 1

NO_TOKEN = -1
KIND_BITS = 2
KIND_MASK = 3
INDEX_KIND = 3
FANOUT_BITS = 4
FANOUT_MASK = 15
EDGES_A_UNIT = 2


@kernel
def spread(token: int) -> int:
    """A bijection of 32-bit numbers that spreads neighbouring token ids over all low bits."""
    mixed = int((np.int64(token) * 0x9E3779B1) & 0xFFFFFFFF)
    return mixed ^ (mixed >> 15)


@kernel
def first_edge(reference: int) -> int:
    """The index in `edges` of a leaf's first edge."""
    return (reference >> KIND_BITS) * EDGES_A_UNIT


@kernel
def last_edge(reference: int) -> int:
    """The index in `edges` of a leaf's last edge, used or not."""
    return first_edge(reference) + (2 << (reference & KIND_MASK)) - 1


@kernel
def locate_edge(words: Int32, edges: Int32, reference: int, token: int) -> int:
    """Return the index in `edges` of the edge of `token` in a set, or -1."""
    bits = spread(token)
    while reference & KIND_MASK == INDEX_KIND:
        reference = words[(reference >> KIND_BITS) * UNIT_WORDS + (bits & FANOUT_MASK)]
        bits >>= FANOUT_BITS
    if reference == 0:
        return -1
    for edge in range(first_edge(reference), last_edge(reference) + 1):
        if edges[edge, 0] == token:
            return edge
    return -1


@kernel
def find_edge(words: Int32, states: Int32, edges: Int32, state: int, token: int) -> int:
    """Return the target of `state`'s edge of `token`, or 0."""
    if states[state, TOKEN] == token:
        return states[state, TARGET]
    reference = states[state, EDGES]
    if reference == 0:
        return 0
    edge = locate_edge(words, edges, reference, token)
    return 0 if edge < 0 else edges[edge, 1]


@kernel
def redirect_edge(words: Int32, states: Int32, edges: Int32, state: int, token: int, target: int) -> None:
    """Point the existing edge of `token` at another target."""
    if states[state, TOKEN] == token:
        states[state, TARGET] = target
    reference = states[state, EDGES]
    if reference != 0:
        edges[locate_edge(words, edges, reference, token), 1] = target


@kernel
def new_leaf(words: Int32, edges: Int32, pool: Int32, next_page: Int32, header: Int32, kind: int) -> int:
    """Return the reference of an empty leaf of `2 << kind` edges, or 0 when the arena is full."""
    unit = allocate(words, pool, next_page, header, kind)
    if unit == 0:
        return 0
    first = unit * EDGES_A_UNIT
    for edge in range(first, first + (2 << kind)):
        edges[edge, 0] = NO_TOKEN
    return unit << KIND_BITS | kind


@kernel
def add_edge(
    words: Int32,
    states: Int32,
    edges: Int32,
    pool: Int32,
    next_page: Int32,
    header: Int32,
    state: int,
    token: int,
    target: int,
) -> bool:
    """Add an edge that `state` does not have; return False, with no edge lost, when the arena is full."""
    if states[state, TOKEN] == NO_TOKEN:
        states[state, TOKEN] = token
        states[state, TARGET] = target
        return True
    # `place` is the word that holds a reference: first the state's own, then one in an index node.
    place = state * STATE_WORDS + EDGES
    if words[place] == 0:
        inline_token, inline_target = states[state, TOKEN], states[state, TARGET]
        if not put_in_leaf(words, edges, pool, next_page, header, place, inline_token, inline_target):
            return False
    bits = spread(token)
    shift = 0
    while True:
        reference = words[place]
        if reference & KIND_MASK == INDEX_KIND:
            place = (reference >> KIND_BITS) * UNIT_WORDS + ((bits >> shift) & FANOUT_MASK)
            shift += FANOUT_BITS
        elif reference & KIND_MASK == RANK_64 and edges[last_edge(reference), 0] != NO_TOKEN:
            if not split_leaf(words, edges, pool, next_page, header, place, shift):
                return False
        else:
            return put_in_leaf(words, edges, pool, next_page, header, place, token, target)


@kernel
def put_in_leaf(
    words: Int32,
    edges: Int32,
    pool: Int32,
    next_page: Int32,
    header: Int32,
    place: int,
    token: int,
    target: int,
) -> bool:
    """Add an edge to the leaf that `words[place]` names, which may be none but not a full leaf of 8.

    Returns False, with nothing changed, when the arena is full.
    """
    reference = words[place]
    kind = reference & KIND_MASK
    first = first_edge(reference)
    used = 0
    if reference != 0:
        used = 2 << kind
        for edge in range(first, first + used):
            if edges[edge, 0] == NO_TOKEN:
                edges[edge, 0] = token
                edges[edge, 1] = target
                return True
    leaf = new_leaf(words, edges, pool, next_page, header, 0 if reference == 0 else kind + 1)
    if leaf == 0:
        return False
    grown = first_edge(leaf)
    for edge in range(used):
        edges[grown + edge, 0] = edges[first + edge, 0]
        edges[grown + edge, 1] = edges[first + edge, 1]
    edges[grown + used, 0] = token
    edges[grown + used, 1] = target
    words[place] = leaf
    if reference != 0:
        free(words, header, reference >> KIND_BITS, kind)
    return True


@kernel
def split_leaf(
    words: Int32, edges: Int32, pool: Int32, next_page: Int32, header: Int32, place: int, shift: int
) -> bool:
    """Replace the full leaf that `words[place]` names by an index node over leaves; False when the arena is full."""
    reference = words[place]
    node = allocate(words, pool, next_page, header, RANK_64)
    if node == 0:
        return False
    base = node * UNIT_WORDS
    for child in range(FANOUT_MASK + 1):
        words[base + child] = 0
    for edge in range(first_edge(reference), last_edge(reference) + 1):
        token, target = edges[edge, 0], edges[edge, 1]
        child = base + ((spread(token) >> shift) & FANOUT_MASK)
        if not put_in_leaf(words, edges, pool, next_page, header, child, token, target):
            # The old leaf is in place and whole; the half-made node is lost until the sequence closes.
            return False
    words[place] = node << KIND_BITS | INDEX_KIND
    free(words, header, reference >> KIND_BITS, RANK_64)
    return True


@kernel
def copy_set(words: Int32, edges: Int32, pool: Int32, next_page: Int32, header: Int32, reference: int) -> int:
    """Return the reference of a deep copy of an edge set, or 0 when the arena is full (or the set is none)."""
    if reference & KIND_MASK != INDEX_KIND:
        return copy_leaf(words, edges, pool, next_page, header, reference)
    top = allocate(words, pool, next_page, header, RANK_64)
    if top == 0:
        return 0
    # Depth first with an explicit stack: a hash of 32 bits gives at most 8 levels of index nodes.
    stack_from = np.empty(9, np.int64)
    stack_to = np.empty(9, np.int64)
    stack_child = np.zeros(9, np.int64)
    stack_from[0] = (reference >> KIND_BITS) * UNIT_WORDS
    stack_to[0] = top * UNIT_WORDS
    depth = 0
    while depth >= 0:
        child = stack_child[depth]
        if child > FANOUT_MASK:
            depth -= 1
            continue
        stack_child[depth] = child + 1
        inner = words[stack_from[depth] + child]
        if inner == 0:
            words[stack_to[depth] + child] = 0
        elif inner & KIND_MASK == INDEX_KIND:
            node = allocate(words, pool, next_page, header, RANK_64)
            if node == 0:
                return 0
            words[stack_to[depth] + child] = node << KIND_BITS | INDEX_KIND
            depth += 1
            stack_from[depth] = (inner >> KIND_BITS) * UNIT_WORDS
            stack_to[depth] = node * UNIT_WORDS
            stack_child[depth] = 0
        else:
            leaf = copy_leaf(words, edges, pool, next_page, header, inner)
            if leaf == 0:
                return 0
            words[stack_to[depth] + child] = leaf
    return top << KIND_BITS | INDEX_KIND


@kernel
def copy_leaf(words: Int32, edges: Int32, pool: Int32, next_page: Int32, header: Int32, reference: int) -> int:
    """Return the reference of a copy of a leaf, or 0 when the arena is full or `reference` is 0."""
    if reference == 0:
        return 0
    kind = reference & KIND_MASK
    leaf = new_leaf(words, edges, pool, next_page, header, kind)
    if leaf != 0:
        first, copied = first_edge(reference), first_edge(leaf)
        for i in range(2 << kind):
            edges[copied + i, 0] = edges[first + i, 0]
            edges[copied + i, 1] = edges[first + i, 1]
    return leaf
