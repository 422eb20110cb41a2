"""Kernels for the LCP-interval tree: the inner nodes of a suffix tree, from suffix and LCP array.

A node is a string that occurs at least twice and is followed by different tokens (a border counts as a token of its
own each time). It stands for an interval of the suffix array, and a scan of the LCP array with a stack meets all of
them (Abouelhoda, Kurtz and Ohlebusch 2004, "Replacing suffix trees with enhanced suffix arrays"). Node 0 is the empty
string. Nodes get their numbers in the order in which the scan meets them first, the same in every kernel here.
"""

from __future__ import annotations

import numpy as np

from freedraft.retrieval.jit import kernel
from freedraft.retrieval.ragged import Int32


@kernel
def count_intervals(lcp: Int32) -> tuple[int, int]:
    """Return how many nodes there are, and a bound of how many of them nest."""
    n = len(lcp)
    deepest = 0
    for depth in lcp:
        deepest = max(deepest, depth)
    stack = np.empty(min(deepest, n) + 2, np.int32)
    stack[0] = 0
    top = 0
    nodes = 1
    for i in range(n):
        depth = lcp[i + 1] if i + 1 < n else 0
        while stack[top] > depth:
            top -= 1
        if stack[top] < depth:
            top += 1
            stack[top] = depth
            nodes += 1
    return nodes, len(stack)


@kernel
def lcp_intervals(
    lcp: Int32, nested: int, depth_of: Int32, first_of: Int32, width_of: Int32, parent_of: Int32, leaf_parent: Int32
) -> None:
    """Fill the nodes' string length, first place in the suffix array, number of suffixes and parent.

    Args:
        lcp: int32 `(n,)`.
        nested: the second result of `count_intervals`.
        depth_of, first_of, width_of, parent_of: int32 `(nodes,)`, written; the root's parent is -1.
        leaf_parent: int32 `(n,)`, written: the node that each suffix hangs from.
    """
    n = len(lcp)
    stack = np.empty(nested, np.int32)
    stack[0] = 0
    depth_of[0], first_of[0], width_of[0], parent_of[0] = 0, 0, n, -1
    top = 0
    nodes = 1
    for i in range(n):
        depth = lcp[i + 1] if i + 1 < n else 0
        if depth > depth_of[stack[top]]:
            depth_of[nodes], first_of[nodes], parent_of[nodes] = depth, i, stack[top]
            top += 1
            stack[top] = nodes
            nodes += 1
        leaf_parent[i] = stack[top]
        while depth_of[stack[top]] > depth:
            closed = stack[top]
            top -= 1
            width_of[closed] = i + 1 - first_of[closed]
            if depth_of[stack[top]] < depth:
                depth_of[nodes], first_of[nodes], parent_of[nodes] = depth, first_of[closed], stack[top]
                top += 1
                stack[top] = nodes
                nodes += 1
            parent_of[closed] = stack[top]


@kernel
def suffix_links(
    lcp: Int32,
    suffixes: Int32,
    rank: Int32,
    nested: int,
    depth_of: Int32,
    first_of: Int32,
    width_of: Int32,
    link_of: Int32,
) -> None:
    """Fill `link_of`, int32 `(nodes,)`: the node of each node's string without its first token; the root's is itself.

    That node is the ancestor, one shorter, of the suffixes that start one later than the node's own. So each node waits
    at the last of those, where a second scan, having met the first, has the answer on its stack.

    Args:
        rank: int32 `(n,)`, the inverse of `suffixes`.
    """
    n = len(lcp)
    nodes = len(depth_of)
    first_waiting = np.full(n, -1, np.int32)
    next_waiting = np.empty(nodes, np.int32)
    for node in range(1, nodes):
        place = rank[suffixes[first_of[node] + width_of[node] - 1] + 1]
        next_waiting[node] = first_waiting[place]
        first_waiting[place] = node
    stack = np.empty(nested, np.int32)
    stack[0] = 0
    link_of[0] = 0
    top = 0
    met = 1
    for i in range(n):
        depth = lcp[i + 1] if i + 1 < n else 0
        if depth > depth_of[stack[top]]:
            top += 1
            stack[top] = met
            met += 1
        node = first_waiting[i]
        while node >= 0:
            low, high = 0, top
            while low < high:
                middle = (low + high) >> 1
                if depth_of[stack[middle]] < depth_of[node] - 1:
                    low = middle + 1
                else:
                    high = middle
            link_of[node] = stack[low]
            node = next_waiting[node]
        while depth_of[stack[top]] > depth:
            top -= 1
            if depth_of[stack[top]] < depth:
                top += 1
                stack[top] = met
                met += 1
