"""Fusion's other shape of draft: the likeliest nodes of a tree, found best-first.

A chain takes the likeliest token again and again. A tree takes, of all tokens that could come next behind any of its
nodes, the one that is likeliest together with its ancestors. So the first k nodes have the greatest expected number of
accepted tokens that k nodes can have by these probabilities, and where one way to go on is far ahead they are a chain.
"""

from __future__ import annotations

import numpy as np

from freedraft.plugins.adjacency import MAX_CONTEXT, Table, push_token
from freedraft.plugins.fusing import weigh, workspace
from freedraft.plugins.heap import ORDER, PARENT, TOKEN, Heap, pop, push
from freedraft.plugins.judging import NOT_STARTED, ROOT, Judged, begin_reply, kind_of, trusted
from freedraft.plugins.mixing import MAX_CANDIDATES, Mixer, correct
from freedraft.plugins.proposals import Proposals, follow_proposals, to_start
from freedraft.plugins.rankings import Rankings
from freedraft.plugins.texts import (
    Places,
    advance_own,
    begin,
    follow_corpora,
    follow_others,
    take_up,
)
from freedraft.retrieval.borrowing import borrowed, hold
from freedraft.retrieval.edges import STATE_WORDS
from freedraft.retrieval.growth import BAD_SLOT, FINE, HEAD_LENGTH, is_open
from freedraft.retrieval.index.follow import Automaton
from freedraft.retrieval.jit import kernel
from freedraft.retrieval.ragged import Float32, Int32, Int64, UInt8


@kernel
def draft_trees(
    words: Int32,
    sequences: Int32,
    generations: Int64,
    corpora: tuple[Automaton, ...],
    damaged: Int64,
    places: Places,
    judged: Judged,
    successors: Int32,
    table: Table,
    rankings: Rankings,
    proposals: Proposals,
    mixer: Mixer,
    sources: UInt8,
    slots: Int64,
    budget: Int32,
    longest: int,
    min_probability: float,
    tokens: Int32,
    parents: Int32,
    probability: Float32,
    source: UInt8,
    offsets: Int64,
) -> int:
    """Write the likeliest tree of each sequence, up to `longest` nodes; FINE, or BAD_SLOT. As `fusing.draft_batch`."""
    words, sequences, generations, corpora, damaged, places, judged, successors, table = borrowed(
        (words, sequences, generations, corpora, damaged, places, judged, successors, table)
    )
    rankings, proposals, mixer, sources, slots, budget, tokens, parents, probability, source, offsets = borrowed(
        (rankings, proposals, mixer, sources, slots, budget, tokens, parents, probability, source, offsets)
    )
    states = words.reshape(-1, STATE_WORDS)
    edges = words.reshape(-1, 2)
    work = workspace(places, proposals)
    evidence, candidates, texts, cursors, in_corpora, at_first = borrowed(work)
    ranking = rankings.ranked.shape[1] > 0
    # Where the committed text is, then each node, in all texts.
    at_each = (
        np.empty((longest + 1, *cursors.shape), np.int64),
        np.empty((longest + 1, *in_corpora.shape), np.int32),
        np.empty((longest + 1, MAX_CONTEXT), np.int32),
        np.empty((longest + 1, *at_first.shape), np.int64),
        np.zeros(longest + 1, np.int64),
    )
    at_cursors, at_corpora, contexts, at, depths = borrowed(at_each)
    # What is known of each entry of the heap, in the order in which they were found.
    most_found = longest * MAX_CANDIDATES
    found_so_far = (
        Heap(np.empty(most_found), np.empty((most_found, 3), np.int32)),
        np.empty(most_found, np.float64),
        np.empty(most_found, np.int64),
    )
    heap, mixed, kinds = borrowed(found_so_far)
    used = 0
    offsets[0] = 0
    for slot in slots:
        if not is_open(sequences, slot):
            return BAD_SLOT
    for row in range(len(slots)):
        slot = slots[row]
        if judged.started[slot] == NOT_STARTED:
            begin_reply(judged, slot, sequences[slot, HEAD_LENGTH])
            begin(words, states, edges, sequences, generations, corpora, damaged, places, slot)
        take_up(states, sequences, generations, places, slot, texts, cursors, in_corpora)
        owner = judged.owner[slot]
        at_cursors[0], at_corpora[0], contexts[0] = cursors, in_corpora, rankings.context[slot]
        to_start(proposals, slot, at[0])
        most = min(longest, budget[row])
        judged.drafted_run[slot] = judged.run[slot]
        nodes, waiting, order = 0, 0, 0
        parent, likelihood = ROOT, 1.0
        while nodes < most:
            here = parent + 1
            last = judged.last[slot] if parent == ROOT else int(judged.tokens[slot, parent])
            rows, found = weigh(
                words, states, edges, sequences, corpora, damaged, successors, table, ranking, owner, True,
                proposals, mixer, texts, at_cursors[here], at_corpora[here], contexts[here], at[here], last, evidence,
                candidates,
            )  # fmt: skip
            for j in range(found):
                kind = kind_of(evidence, rows, candidates.tokens[j])
                worth = trusted(judged, slot, kind, candidates.mixed[j])
                joint = likelihood * correct(mixer, judged.run[slot] + depths[here], worth)
                if joint >= min_probability:
                    kinds[order] = kind
                    mixed[order] = worth
                    push(heap, waiting, joint, order, candidates.tokens[j], parent)
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
            tokens[used + nodes] = token
            parents[used + nodes] = parent
            probability[used + nodes] = likelihood
            source[used + nodes] = sources[kinds[found_as]]
            nodes += 1
            if nodes < most:
                at_cursors[nodes], at_corpora[nodes] = at_cursors[parent + 1], at_corpora[parent + 1]
                contexts[nodes], at[nodes], depths[nodes] = contexts[parent + 1], at[parent + 1], depths[parent + 1] + 1
                advance_own(words, states, edges, sequences, texts, at_cursors[nodes], token)
                follow_others(words, states, edges, sequences, texts, at_cursors[nodes], token)
                follow_corpora(corpora, damaged, at_corpora[nodes], token)
                follow_proposals(proposals, slot, at[nodes], token)
                push_token(contexts[nodes], token)
            parent = nodes - 1
        judged.considered[slot] = nodes
        used += nodes
        offsets[row + 1] = used
    hold((work, at_each, found_so_far))
    return FINE
