"""The full check of a segment's structure: what `verify` looks at besides checksums."""

from __future__ import annotations

from freedraft.retrieval.index.follow import Automaton, find_edge
from freedraft.retrieval.index.format import (
    BORDER,
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
from freedraft.retrieval.index.reporting import Report, nobody
from freedraft.retrieval.jit import kernel
from freedraft.retrieval.ragged import Int32, Int64

NODES_AT_ONCE = 1 << 18

FINDINGS = {
    1: "a document's border is not where the table of documents says",
    2: "a token is negative",
    3: "the root is not an empty string",
    4: "a link leads out of the nodes, or not to a shorter string",
    5: "a node's text ends out of the text, or crosses a document's border",
    6: "the edges of a node are out of the edges, or overlap another's",
    7: "a node has no continuation, or its occurrences are not those of its continuations",
    8: "the edges of a node are not in order of their tokens",
    9: "an edge leads out of the nodes, or not to a longer string",
    10: "an edge's text is out of the text, crosses a document's border, or does not begin with its token",
    11: "an edge's count is below 1, or above that of the likeliest continuation",
    12: "what follows a node's string follows the suffix that it links to less often",
}


@kernel
def border_from(starts: Int64, position: int) -> int:
    """Where the document ends that `position` is in."""
    low, high = 0, len(starts) - 1
    while low < high:
        middle = (low + high) >> 1
        if starts[middle + 1] <= position:
            low = middle + 1
        else:
            high = middle
    return starts[low + 1] - 1


@kernel
def check_edge(automaton: Automaton, starts: Int64, node: int, token: int, target: int, label: int, times: int) -> int:
    """Return the number of a finding, or 0."""
    if target >= len(automaton.nodes):
        return 9
    if target >= 0 and automaton.nodes[target, LENGTH] < automaton.nodes[node, LENGTH] + label:
        return 9
    start = automaton.nodes[target, END] - label if target >= 0 else ~target
    if label < 1 or start < 0 or start + label > len(automaton.text) or automaton.text[start] != token or token < 0:
        return 10
    if start + label > border_from(starts, start):
        return 10
    if not 1 <= times <= automaton.nodes[node, TIMES]:
        return 11
    return 0


def validate_structure(automaton: Automaton, starts: Int64, min_count: int, report: Report = nobody) -> tuple[int, int]:
    """Check what a sound segment promises; return the number of the first of `FINDINGS`, 0 = none, and its node.

    Args:
        starts: int64 `(documents + 1,)`, checked already to rise from 0 to the text's length.
        min_count: of the segment; where it is 1, no continuation was dropped.
        report: called after every `NODES_AT_ONCE` nodes.
    """
    finding, where = check_text(automaton, starts)
    nodes = len(automaton.nodes)
    for first in range(0, nodes, NODES_AT_ONCE):
        if finding:
            return finding, where
        last = min(first + NODES_AT_ONCE, nodes)
        finding, where = check_nodes(automaton, starts, min_count, first, last)
        report(0.5 * last / nodes)
    for first in range(1, nodes, NODES_AT_ONCE):
        if finding:
            return finding, where
        last = min(first + NODES_AT_ONCE, nodes)
        finding, where = check_links(automaton, first, last)
        report(0.5 + 0.5 * last / nodes)
    return finding, where


@kernel
def check_text(automaton: Automaton, starts: Int64) -> tuple[int, int]:
    """Check the documents' borders and tokens, and the root."""
    text, nodes, _ = automaton
    for document in range(len(starts) - 1):
        if text[starts[document + 1] - 1] != BORDER:
            return 1, document
        for i in range(starts[document], starts[document + 1] - 1):
            if text[i] < 0:
                return 2, i
    if nodes[0, LENGTH] != 0:
        return 3, 0
    return 0, 0


@kernel
def check_nodes(automaton: Automaton, starts: Int64, min_count: int, first: int, last: int) -> tuple[int, int]:
    """Check the nodes from `first` to before `last`; those before are sound."""
    text, nodes, edges = automaton
    expected = 0
    if first > 0:
        expected = nodes[first - 1, EDGES] + nodes[first - 1, DEGREE]
    for node in range(first, last):
        row = nodes[node]
        if node > 0:
            if not 0 <= row[LINK] < len(nodes) or nodes[row[LINK], LENGTH] >= row[LENGTH]:
                return 4, node
            start = row[END] - row[LENGTH]
            if not 0 <= start < row[END] <= len(text) or row[END] > border_from(starts, start):
                return 5, node
        if row[EDGES] != expected or row[DEGREE] < 0:
            return 6, node
        expected += row[DEGREE]
        if expected > len(edges):
            return 6, node
        if row[TOKEN] == BORDER and node == 0 and row[DEGREE] == 0:
            continue
        finding = check_edge(automaton, starts, node, row[TOKEN], row[TARGET], row[LABEL], row[TIMES])
        if finding != 0:
            return finding, node
        total = row[TIMES] * 1
        before = -1
        for edge in edges[row[EDGES] : row[EDGES] + row[DEGREE]]:
            if edge[EDGE_TOKEN] <= before or edge[EDGE_TOKEN] == row[TOKEN]:
                return 8, node
            before = edge[EDGE_TOKEN]
            finding = check_edge(
                automaton, starts, node, edge[EDGE_TOKEN], edge[EDGE_TARGET], edge[EDGE_LABEL], edge[EDGE_TIMES]
            )
            if finding != 0:
                return finding, node
            total += edge[EDGE_TIMES]
        if total > row[COUNT] or (min_count <= 1 and total != row[COUNT]):
            return 7, node
    if last == len(nodes) and expected != len(edges):
        return 6, len(nodes)
    return 0, 0


@kernel
def check_links(automaton: Automaton, first: int, last: int) -> tuple[int, int]:
    """Check that every continuation of these nodes is one of their link's; the rest of the structure is sound."""
    _, nodes, edges = automaton
    for node in range(first, last):
        row = nodes[node]
        if find_edge(nodes, edges, row[LINK], row[TOKEN])[2] < row[TIMES]:
            return 12, node
        for edge in edges[row[EDGES] : row[EDGES] + row[DEGREE]]:
            if find_edge(nodes, edges, row[LINK], edge[EDGE_TOKEN])[2] < edge[EDGE_TIMES]:
                return 12, node
    return 0, 0


@kernel
def count_occurrences(text: Int32, starts: Int64, pattern: Int32, places: Int64) -> int:
    """Write where `pattern`, int32 `(m,)`, ends in the text with a token after it; return how often it does.

    Args:
        places: int64 `(k,)`, written: the documents of the first k occurrences.
    """
    found = 0
    m = len(pattern)
    for document in range(len(starts) - 1):
        for start in range(starts[document], starts[document + 1] - 1 - m):
            same = 0
            while same < m and text[start + same] == pattern[same]:
                same += 1
            if same == m:
                if found < len(places):
                    places[found] = document
                found += 1
    return found
