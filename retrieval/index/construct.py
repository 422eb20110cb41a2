"""The compact suffix automaton of a text of documents, from its suffix array.

The automaton is the one of Blumer et al. (1987, "Complete inverted files for efficient text retrieval and analysis"),
also known as CDAWG: of all strings that occur, a node is one that neither every occurrence is preceded by the same
token nor every one followed by the same; every other string is on an edge, and an edge is a pointer into the text. It
comes from the suffix tree by merging each node with the one that is longer by the token that always precedes it
(Inenaga et al. 2005, "On-line construction of compact directed acyclic word graphs", section 3).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from freedraft.retrieval.index.format import (
    BORDER,
    COUNT,
    DEGREE,
    EDGE_FIELDS,
    EDGE_LABEL,
    EDGE_TARGET,
    EDGE_TIMES,
    EDGE_TOKEN,
    EDGES,
    END,
    LABEL,
    LENGTH,
    LINK,
    NODE_FIELDS,
    TARGET,
    TIMES,
    TOKEN,
)
from freedraft.retrieval.index.intervals import count_intervals, lcp_intervals, suffix_links
from freedraft.retrieval.index.reporting import Report, nobody
from freedraft.retrieval.index.suffixes import lcp_array, suffix_array
from freedraft.retrieval.jit import kernel
from freedraft.retrieval.ragged import Int32

BUILD_BYTES_A_TOKEN = 96
"""Memory that building takes, an upper estimate; natural text takes about 60."""


class Tree(NamedTuple):
    """The suffix tree's inner nodes, int32 `(nodes,)` each; see `intervals`."""

    depth: Int32
    first: Int32
    width: Int32
    parent: Int32
    link: Int32


def compact_suffix_automaton(text: Int32, min_count: int = 1, report: Report = nobody) -> tuple[Int32, Int32]:
    """Build the nodes and edges of a segment.

    Args:
        text: int32 `(n,)`, tokens from 0 up, `BORDER` after each document.
        min_count: keep a continuation only where context and continuation together occur this often.
        report: called between the steps, with shares of the time that they took with a million tokens of replies.

    Returns:
        nodes int32 `(nodes, NODE_FIELDS)`, the root first, and edges int32 `(edges, EDGE_FIELDS)`; their spec is
        docs/index-format.md.
        Same text, same bytes.
    """
    n = len(text)
    suffixes = suffix_array(text)
    report(0.39)
    lcp = lcp_array(text, suffixes)
    report(0.46)
    count, nested = count_intervals(lcp)
    tree = Tree(*(np.empty(count, np.int32) for _ in range(5)))
    leaf_parent = np.empty(n, np.int32)
    lcp_intervals(lcp, nested, tree.depth, tree.first, tree.width, tree.parent, leaf_parent)
    report(0.51)
    rank = np.empty(n, np.int32)
    rank[suffixes] = np.arange(n, dtype=np.int32)
    suffix_links(lcp, suffixes, rank, nested, tree.depth, tree.first, tree.width, tree.link)
    del lcp, rank
    report(0.61)
    class_of = np.empty(count, np.int32)
    link_of = np.empty(count, np.int32)
    merge_classes(tree, class_of, link_of)
    report(0.66)
    degree = np.zeros(count, np.int32)
    borders = np.zeros(count, np.int32)
    count_children(text, suffixes, leaf_parent, tree, min_count, class_of, degree, borders)
    number = np.empty(count, np.int32)
    nodes_kept, edges_kept = number_nodes(tree, class_of, degree, number)
    nodes = np.empty((nodes_kept, NODE_FIELDS), np.int32)
    edges = np.empty((edges_kept, EDGE_FIELDS), np.int32)
    write_nodes(suffixes, tree, link_of, degree, borders, number, nodes)
    report(0.72)
    write_edges(text, suffixes, leaf_parent, tree, min_count, class_of, number, nodes, edges)
    report(1.0)
    return nodes, edges


@kernel
def merge_classes(tree: Tree, class_of: Int32, link_of: Int32) -> None:
    """Find the automaton's node of each node of the tree, and the suffix links between those.

    A string and the one without its first token occur equally often exactly if the token always precedes.

    Args:
        class_of: written: of the strings with the same occurrences, the node of the longest.
        link_of: written where `class_of[node] == node`: the node of the longest suffix that occurs more often.
    """
    nodes = len(tree.depth)
    for node in range(nodes):
        class_of[node] = node
    for node in range(1, nodes):
        if tree.width[tree.link[node]] == tree.width[node] and tree.link[node] != 0:
            class_of[tree.link[node]] = -1
    link_of[0] = 0
    for node in range(1, nodes):
        if class_of[node] == node:
            shorter = tree.link[node]
            while shorter != 0 and tree.width[shorter] == tree.width[node]:
                class_of[shorter] = node
                shorter = tree.link[shorter]
            link_of[node] = shorter


@kernel
def count_children(
    text: Int32,
    suffixes: Int32,
    leaf_parent: Int32,
    tree: Tree,
    min_count: int,
    class_of: Int32,
    degree: Int32,
    borders: Int32,
) -> None:
    """Add up, for each node that is an automaton's, the edges it keeps and the borders that follow it."""
    for i in range(len(suffixes)):
        parent = leaf_parent[i]
        if class_of[parent] == parent:
            if text[suffixes[i] + tree.depth[parent]] == BORDER:
                borders[parent] += 1
            elif min_count <= 1:
                degree[parent] += 1
    for node in range(1, len(tree.depth)):
        parent = tree.parent[node]
        if class_of[parent] == parent and tree.width[node] >= min_count:
            degree[parent] += 1


@kernel
def number_nodes(tree: Tree, class_of: Int32, degree: Int32, number: Int32) -> tuple[int, int]:
    """Number the automaton's nodes that keep an edge, often seen ones first: they share pages and cache lines.

    Args:
        number: written; -1 where there is no such node. The root is 0.

    Returns:
        How many nodes, and how many edges lie outside of nodes.
    """
    nodes = len(tree.depth)
    fill = np.zeros(34, np.int64)
    edges = max(0, degree[0] - 1)
    for node in range(1, nodes):
        number[node] = -1
        if class_of[node] == node and degree[node] > 0:
            fill[33 - bits(tree.width[node])] += 1
            edges += degree[node] - 1
    total = 1
    for level in range(34):
        here = fill[level]
        fill[level] = total
        total += here
    number[0] = 0
    for node in range(1, nodes):
        if class_of[node] == node and degree[node] > 0:
            level = 33 - bits(tree.width[node])
            number[node] = fill[level]
            fill[level] += 1
    return total, edges


@kernel
def bits(value: int) -> int:
    """The number of binary digits of a positive value."""
    digits = 0
    while value > 0:
        value >>= 1
        digits += 1
    return digits


@kernel
def write_nodes(
    suffixes: Int32, tree: Tree, link_of: Int32, degree: Int32, borders: Int32, number: Int32, nodes: Int32
) -> None:
    """Fill the nodes but for their likeliest edge, DEGREE being 0 yet and EDGES where their edges begin."""
    for node in range(len(tree.depth)):
        if number[node] >= 0:
            row = nodes[number[node]]
            row[LENGTH] = tree.depth[node]
            row[LINK] = number[link_of[node]]
            row[COUNT] = tree.width[node] - borders[node]
            # An empty text has no suffix at all.
            row[END] = suffixes[tree.first[node]] + tree.depth[node] if node != 0 else 0
            row[DEGREE] = degree[node]
            row[TOKEN] = BORDER
            row[TARGET], row[LABEL], row[TIMES] = 0, 0, 0
    at = 0
    for i in range(len(nodes)):
        nodes[i, EDGES] = at
        at += max(0, nodes[i, DEGREE] - 1)
        nodes[i, DEGREE] = 0


@kernel
def add_edge(nodes: Int32, edges: Int32, node: int, token: int, target: int, label: int, times: int) -> None:
    """Give a node one more edge, in any order; the likeliest, of equals the smallest token, moves into the node."""
    row = nodes[node]
    if row[TOKEN] == BORDER:
        row[TOKEN], row[TARGET], row[LABEL], row[TIMES] = token, target, label, times
        return
    if times > row[TIMES] or (times == row[TIMES] and token < row[TOKEN]):
        token, row[TOKEN] = row[TOKEN], token
        target, row[TARGET] = row[TARGET], target
        label, row[LABEL] = row[LABEL], label
        times, row[TIMES] = row[TIMES], times
    edge = row[EDGES] + row[DEGREE]
    row[DEGREE] += 1
    edges[edge, EDGE_TOKEN] = token
    edges[edge, EDGE_TARGET] = target
    edges[edge, EDGE_LABEL] = label
    edges[edge, EDGE_TIMES] = times


@kernel
def write_edges(
    text: Int32,
    suffixes: Int32,
    leaf_parent: Int32,
    tree: Tree,
    min_count: int,
    class_of: Int32,
    number: Int32,
    nodes: Int32,
    edges: Int32,
) -> None:
    """Fill the edges, and the likeliest one of each node into it; edges of a node are sorted by token."""
    n = len(text)
    if min_count <= 1:
        # Where the document ends that a position is in: so does an edge to no node.
        ends = np.empty(n, np.int32)
        border = n
        for i in range(n - 1, -1, -1):
            if text[i] == BORDER:
                border = i
            ends[i] = border
        for i in range(n):
            parent = leaf_parent[i]
            start = suffixes[i] + tree.depth[parent]
            if class_of[parent] == parent and text[start] != BORDER:
                add_edge(nodes, edges, number[parent], text[start], ~start, ends[start] - start, 1)
    for node in range(1, len(tree.depth)):
        parent = tree.parent[node]
        if class_of[parent] == parent and tree.width[node] >= min_count:
            start = suffixes[tree.first[node]] + tree.depth[parent]
            target = number[class_of[node]]
            if target < 0:
                target = ~start
            label = tree.depth[node] - tree.depth[parent]
            add_edge(nodes, edges, number[parent], text[start], target, label, tree.width[node])
    for i in range(len(nodes)):
        sort_edges(edges[nodes[i, EDGES] : nodes[i, EDGES] + nodes[i, DEGREE]])


@kernel
def sort_edges(edges: Int32) -> None:
    """Sort the edges of one node by token, in place."""
    if len(edges) > 16:
        order = np.argsort(edges[:, EDGE_TOKEN])
        copy = edges[order]
        edges[:] = copy
        return
    for i in range(1, len(edges)):
        token, target, label, times = edges[i]
        j = i
        while j > 0 and edges[j - 1, EDGE_TOKEN] > token:
            edges[j] = edges[j - 1]
            j -= 1
        edges[j, EDGE_TOKEN], edges[j, EDGE_TARGET] = token, target
        edges[j, EDGE_LABEL], edges[j, EDGE_TIMES] = label, times
