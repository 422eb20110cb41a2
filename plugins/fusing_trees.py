"""Fusion's other shape of draft: the likeliest nodes of a tree, found best-first.

A chain takes the likeliest token again and again. A tree takes, of all tokens that could come next behind any of its
nodes, the one that is likeliest together with its ancestors. So the first k nodes have the greatest expected number of
accepted tokens that k nodes can have by these probabilities, and where one way to go on is far ahead they are a chain.
"""

from __future__ import annotations

import numpy as np

from freedraft.plugins.adjacency import MAX_CONTEXT
from freedraft.plugins.fusing import Drafted, Learnt, Place, all_open, go_past, go_to_draft, new_place, weigh, workspace
from freedraft.plugins.heap import ORDER, PARENT, TOKEN, Heap, pop, push
from freedraft.plugins.judging import ROOT, kind_of, trusted
from freedraft.plugins.mixing import MAX_CANDIDATES, correct
from freedraft.plugins.texts import Library
from freedraft.retrieval.borrowing import borrowed, hold
from freedraft.retrieval.growth import BAD_SLOT, FINE
from freedraft.retrieval.jit import kernel
from freedraft.retrieval.lending import Lent
from freedraft.retrieval.ragged import Int32, Int64, UInt8


@kernel
def new_places(place: Place, count: int) -> Place:
    """Room for so many places of one sequence: arrays with a row for each, but for `texts`, which they share."""
    return Place(
        place.texts,
        np.empty((count, *place.cursors.shape), np.int64),
        np.empty((count, *place.in_corpora.shape), np.int32),
        np.empty((count, MAX_CONTEXT), np.int32),
        np.empty((count, *place.at.shape), np.int64),
    )


@kernel
def at_node(places: Place, i: int) -> Place:
    """The i-th of them."""
    return Place(places.texts, places.cursors[i], places.in_corpora[i], places.context[i], places.at[i])


@kernel
def copy_place(source: Place, target: Place) -> None:
    """Let one place be where another is."""
    target.cursors[:], target.in_corpora[:] = source.cursors, source.in_corpora
    target.context[:], target.at[:] = source.context, source.at


@kernel
def draft_trees(
    texts: Lent[tuple[Library, Learnt]],
    sources: UInt8,
    slots: Int64,
    budget: Int32,
    longest: int,
    min_probability: float,
    drafted: Drafted,
) -> int:
    """Write the likeliest tree of each sequence, up to `longest` nodes; FINE, or BAD_SLOT. As `fusing.draft_batch`."""
    library, learnt = borrowed(texts.arrays)
    if not all_open(library, slots):
        return BAD_SLOT
    sources, slots, budget, drafted = borrowed((sources, slots, budget, drafted))
    judged, mixer = learnt.judged, learnt.mixer
    room_made = (new_place(library, learnt), workspace())
    first, work = borrowed(room_made)
    # Where the committed text is, then each node.
    places_made = new_places(first, longest + 1)
    places = borrowed(places_made)
    depths_made = np.zeros(longest + 1, np.int64)
    depths = borrowed(depths_made)
    # What is known of each entry of the heap, in the order in which they were found.
    most_found = longest * MAX_CANDIDATES
    found_so_far = (
        Heap(np.empty(most_found), np.empty((most_found, 3), np.int32)),
        np.empty(most_found, np.float64),
        np.empty(most_found, np.int64),
    )
    heap, mixed, kinds = borrowed(found_so_far)
    used = 0
    drafted.offsets[0] = 0
    for row in range(len(slots)):
        slot = slots[row]
        go_to_draft(library, learnt, slot, first)
        copy_place(first, at_node(places, 0))
        most = min(longest, budget[row])
        nodes, waiting, order = 0, 0, 0
        parent, likelihood = ROOT, 1.0
        while nodes < most:
            here = parent + 1
            last = judged.last[slot] if parent == ROOT else int(judged.tokens[slot, parent])
            rows, found = weigh(library, learnt, slot, at_node(places, here), last, True, work)
            for j in range(found):
                kind = kind_of(work.evidence, rows, work.candidates.tokens[j])
                worth = trusted(judged, slot, kind, work.candidates.mixed[j])
                joint = likelihood * correct(mixer, judged.run[slot] + depths[here], worth)
                if joint >= min_probability:
                    kinds[order] = kind
                    mixed[order] = worth
                    push(heap, waiting, joint, order, work.candidates.tokens[j], parent)
                    waiting += 1
                    order += 1
            if waiting == 0:
                break
            likelihood = heap.likelihood[0]
            token, parent, found_as = heap.node[0, TOKEN], heap.node[0, PARENT], heap.node[0, ORDER]
            waiting -= 1
            pop(heap, waiting)
            judged.tokens[slot, nodes] = token
            judged.parents[slot, nodes] = parent
            judged.mixed[slot, nodes] = mixed[found_as]
            judged.kinds[slot, nodes] = kinds[found_as]
            drafted.tokens[used + nodes] = token
            drafted.parents[used + nodes] = parent
            drafted.probability[used + nodes] = likelihood
            drafted.source[used + nodes] = sources[kinds[found_as]]
            nodes += 1
            if nodes < most:
                copy_place(at_node(places, parent + 1), at_node(places, nodes))
                depths[nodes] = depths[parent + 1] + 1
                go_past(library, learnt, slot, at_node(places, nodes), token)
            parent = nodes - 1
        judged.considered[slot] = nodes
        used += nodes
        drafted.offsets[row + 1] = used
    hold((room_made, places_made, depths_made, found_so_far))
    return FINE
