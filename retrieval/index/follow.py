"""Kernels that follow texts through a segment: where a text's longest known suffix is, and what came after it.

A cursor is a place in the automaton, int32 fields: a node, or on the way along an edge from it. It stands for the
longest suffix of the text so far that is a **context**: that a kept continuation follows in some document. Reading a
token moves it down, in the automaton, as long as the corpus goes on like the text, and along suffix links when it does
not: O(1) amortised a token, by the argument of McCreight (1976, "A space-economical suffix tree construction
algorithm") for skipping and counting.

Nothing in a segment is trusted. Every node, edge and position is checked against the arrays' bounds before it is used,
every link must lead to a shorter string, and every step along an edge must consume a token, so that damaged or hostile
files end in `DAMAGED`, not in a crash or a loop.
"""

from __future__ import annotations

from typing import NamedTuple

from freedraft.retrieval.index.format import (
    COUNT,
    DEGREE,
    EDGE_LABEL,
    EDGE_TARGET,
    EDGE_TIMES,
    EDGE_TOKEN,
    EDGES,
    END,
    LABEL,
    LENGTH,
    LINK,
    TARGET,
    TIMES,
    TOKEN,
)
from freedraft.retrieval.jit import kernel
from freedraft.retrieval.ragged import Int32, Int64

# Fields of a cursor.
AT_NODE = 0  # the last node passed
AT_USED = 1  # tokens gone along the edge from it; 0 = at the node
AT_TEXT = 2  # where in the text the edge's next token is
AT_LABEL = 3  # tokens of the edge
AT_TARGET = 4  # the node that it leads to; negative = none
AT_TIMES = 5  # how often the edge's string occurs
AT_LENGTH = 6  # tokens of the context
AT_OPEN = 7
CURSOR_FIELDS = 8

FINE, DAMAGED, BAD_SLOT, BAD_TOKEN = 0, 1, 2, 3
NO_EDGE = -1


class Automaton(NamedTuple):
    """A segment's arrays, as kernels read them; int32, see docs/index-format.md.

    Attributes:
        text: `(n,)`.
        nodes: `(nodes, NODE_FIELDS)`.
        edges: `(edges, EDGE_FIELDS)`.
    """

    text: Int32
    nodes: Int32
    edges: Int32


@kernel
def find_edge(nodes: Int32, edges: Int32, node: int, token: int) -> tuple[int, int, int]:
    """The edge of `node` (in bounds) that begins with `token`: target, label length and times; times 0 = none."""
    # Fields are read one by one: a view of a row costs more than all of them.
    if nodes[node, TOKEN] == token:
        return nodes[node, TARGET], nodes[node, LABEL], nodes[node, TIMES]
    low = nodes[node, EDGES]
    high = low + nodes[node, DEGREE]
    # The sum of two int32 is an int64 here.
    if low < 0 or high > len(edges):
        return 0, 0, 0
    while low < high:
        middle = (low + high) >> 1
        found = edges[middle, EDGE_TOKEN]
        if found == token:
            return edges[middle, EDGE_TARGET], edges[middle, EDGE_LABEL], edges[middle, EDGE_TIMES]
        if found < token:
            low = middle + 1
        else:
            high = middle
    return 0, 0, 0


@kernel
def label_start(text: Int32, nodes: Int32, target: int, label: int) -> int:
    """Where in the text an edge's tokens are, or NO_EDGE if it is damaged."""
    if label < 1:
        return NO_EDGE
    if target >= 0:
        if target >= len(nodes):
            return NO_EDGE
        start = nodes[target, END] - label
    else:
        start = ~target
    if start < 0 or start + label > len(text):
        return NO_EDGE
    return start


@kernel
def enter_edge(text: Int32, nodes: Int32, cursor: Int32, target: int, label: int, times: int, used: int) -> int:
    """Move a cursor that is at the edge's node along it by `used` of its tokens, 1 to `label`."""
    start = label_start(text, nodes, target, label)
    if start == NO_EDGE or times < 1:
        return DAMAGED
    if target >= 0 and used == label:
        cursor[AT_NODE] = target
        cursor[AT_USED] = 0
    else:
        cursor[AT_USED] = used
        cursor[AT_TEXT] = start + used
        cursor[AT_LABEL] = label
        cursor[AT_TARGET] = target
        cursor[AT_TIMES] = times
    return FINE


@kernel
def shorten(text: Int32, nodes: Int32, edges: Int32, cursor: Int32) -> int:
    """Move a cursor that is not at the root to its longest suffix that may have more occurrences."""
    node, used = cursor[AT_NODE], cursor[AT_USED]
    at = cursor[AT_TEXT] - used
    if node == 0:
        used -= 1
        at += 1
        cursor[AT_LENGTH] = used
    else:
        link = nodes[node, LINK]
        if not 0 <= link < len(nodes) or nodes[link, LENGTH] >= nodes[node, LENGTH]:
            return DAMAGED
        node = link
        cursor[AT_LENGTH] = nodes[link, LENGTH] + used
    cursor[AT_NODE] = node
    cursor[AT_USED] = 0
    while used > 0:
        target, label, times = find_edge(nodes, edges, cursor[AT_NODE], text[at])
        if times < 1 or (target < 0 and label < used):
            return DAMAGED
        passed = min(label, used)
        if enter_edge(text, nodes, cursor, target, label, times, passed) == DAMAGED:
            return DAMAGED
        at += passed
        used -= passed
    return FINE


@kernel
def settle(text: Int32, nodes: Int32, edges: Int32, cursor: Int32) -> int:
    """Shorten until something follows, or until the root."""
    while cursor[AT_USED] > 0 and cursor[AT_USED] >= cursor[AT_LABEL]:
        if shorten(text, nodes, edges, cursor) == DAMAGED:
            return DAMAGED
    return FINE


@kernel
def to_root(cursor: Int32) -> None:
    """Forget the text so far."""
    cursor[AT_NODE] = 0
    cursor[AT_USED] = 0
    cursor[AT_LENGTH] = 0


@kernel
def at_root(cursor: Int32) -> bool:
    """Whether the context is the empty one."""
    return cursor[AT_NODE] == 0 and cursor[AT_USED] == 0


@kernel
def step_down(text: Int32, nodes: Int32, edges: Int32, cursor: Int32, token: int) -> int:
    """Move a cursor by a token that follows its context, without settling; NO_EDGE, and unmoved, if none does."""
    if cursor[AT_USED] == 0:
        target, label, times = find_edge(nodes, edges, cursor[AT_NODE], token)
        if times == 0:
            return NO_EDGE
        if enter_edge(text, nodes, cursor, target, label, times, 1) == DAMAGED:
            return DAMAGED
    else:
        if cursor[AT_USED] >= cursor[AT_LABEL] or text[cursor[AT_TEXT]] != token:
            return NO_EDGE
        cursor[AT_TEXT] += 1
        cursor[AT_USED] += 1
        if cursor[AT_USED] == cursor[AT_LABEL] and cursor[AT_TARGET] >= 0:
            cursor[AT_NODE] = cursor[AT_TARGET]
            cursor[AT_USED] = 0
    cursor[AT_LENGTH] += 1
    return FINE


@kernel
def advance(text: Int32, nodes: Int32, edges: Int32, cursor: Int32, token: int) -> int:
    """Move a settled cursor by the text's next token."""
    while True:
        status = step_down(text, nodes, edges, cursor, token)
        if status == FINE:
            return settle(text, nodes, edges, cursor)
        if status == DAMAGED:
            return DAMAGED
        if at_root(cursor):
            cursor[AT_LENGTH] = 0
            return FINE
        if shorten(text, nodes, edges, cursor) == DAMAGED:
            return DAMAGED


@kernel
def context_count(nodes: Int32, cursor: Int32) -> int:
    """How often a settled cursor's context is followed by anything."""
    if cursor[AT_USED] == 0:
        return nodes[cursor[AT_NODE], COUNT]
    return cursor[AT_TIMES]


@kernel
def likeliest_of(text: Int32, nodes: Int32, cursor: Int32) -> tuple[int, int]:
    """The most frequent continuation of a settled cursor's context, and how often it followed."""
    if cursor[AT_USED] == 0:
        node = cursor[AT_NODE]
        return nodes[node, TOKEN], nodes[node, TIMES]
    return text[cursor[AT_TEXT]], cursor[AT_TIMES]


@kernel
def advance_batch(automaton: Automaton, cursors: Int32, slots: Int64, tokens: Int32, offsets: Int64) -> int:
    """Move the cursors `cursors[slots]`, int32 `(slots, CURSOR_FIELDS)`, by a ragged batch of tokens.

    Returns:
        FINE; BAD_SLOT or BAD_TOKEN with nothing changed; or DAMAGED with the cursors concerned at the root.
    """
    text, nodes, edges = automaton
    for slot in slots:
        if not 0 <= slot < len(cursors) or cursors[slot, AT_OPEN] != 1:
            return BAD_SLOT
    for token in tokens:
        if token < 0:
            return BAD_TOKEN
    result = FINE
    for row in range(len(slots)):
        cursor = cursors[slots[row]]
        for i in range(offsets[row], offsets[row + 1]):
            if advance(text, nodes, edges, cursor, tokens[i]) == DAMAGED:
                to_root(cursor)
                result = DAMAGED
    return result


@kernel
def contexts_batch(
    automaton: Automaton, cursors: Int32, slots: Int64, length: Int32, count: Int32, likeliest: Int32, times: Int32
) -> int:
    """Fill the arrays of `segment.Contexts`, int32 `(n, depth)` each, from the left."""
    text, nodes, edges = automaton
    for row in range(len(slots)):
        cursor = cursors[slots[row]].copy()
        for place in range(length.shape[1]):
            if at_root(cursor):
                break
            length[row, place] = cursor[AT_LENGTH]
            count[row, place] = context_count(nodes, cursor)
            likeliest[row, place], times[row, place] = likeliest_of(text, nodes, cursor)
            if shorten(text, nodes, edges, cursor) == DAMAGED or settle(text, nodes, edges, cursor) == DAMAGED:
                return DAMAGED
    return FINE


@kernel
def find_batch(automaton: Automaton, string: Int32, cursor: Int32) -> bool:
    """Walk from the root along all of `string`; leave the cursor there, unsettled. False if it does not occur."""
    text, nodes, edges = automaton
    to_root(cursor)
    for token in string:  # noqa: SIM110 - Numba knows no generator here
        if step_down(text, nodes, edges, cursor, token) != FINE:
            return False
    return True
