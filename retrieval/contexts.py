"""Kernels that read a sequence's automaton: its contexts, and what followed them."""

from __future__ import annotations

import numpy as np

from freedraft.retrieval.edges import (
    BEST_BITS,
    BEST_MAX,
    COUNT,
    EDGES,
    FANOUT_MASK,
    INDEX_KIND,
    KIND_BITS,
    KIND_MASK,
    LENGTH,
    LINK,
    NO_TOKEN,
    ORIGIN,
    RECENT,
    STATE_WORDS,
    TARGET,
    TOKEN,
    first_edge,
    last_edge,
)
from freedraft.retrieval.growth import HEAD_LAST, HEAD_LENGTH, HEAD_MATCH, HEAD_MATCH_LENGTH, text_at
from freedraft.retrieval.jit import kernel
from freedraft.retrieval.memory import UNIT_WORDS
from freedraft.retrieval.ragged import Int32, Int64


@kernel
def ends_text(states: Int32, header: Int32, state: int) -> bool:
    """Whether what was learnt ends with this state's longest string, whose COUNT then lacks that occurrence."""
    suffix = header[HEAD_LAST]
    while states[suffix, LENGTH] > states[state, LENGTH]:
        suffix = states[suffix, LINK]
    return suffix == state


@kernel
def likeliest_times(states: Int32, header: Int32, state: int) -> int:
    """How often `states[state, TOKEN]` has followed."""
    best = states[state, ORIGIN] & BEST_MAX
    if best < BEST_MAX:
        return best
    target = states[state, TARGET]
    return states[target, COUNT] + (1 if ends_text(states, header, target) else 0)


@kernel
def contexts_batch(
    words: Int32,
    sequences: Int32,
    slots: Int64,
    length: Int32,
    count: Int32,
    position: Int32,
    first: Int32,
    likeliest: Int32,
    times: Int32,
    recent: Int32,
    state_of: Int32,
) -> None:
    """Fill the arrays of `automaton.Contexts`, `(n, depth)` each."""
    states = words.reshape(-1, STATE_WORDS)
    for row in range(len(slots)):
        header = sequences[slots[row]]
        state = header[HEAD_MATCH]
        matched = header[HEAD_MATCH_LENGTH]
        place = 0
        while state != 0 and place < length.shape[1]:
            if states[state, COUNT] != 0:
                length[row, place] = matched
                count[row, place] = states[state, COUNT]
                position[row, place] = states[state, RECENT]
                first[row, place] = states[state, ORIGIN] >> BEST_BITS
                likeliest[row, place] = states[state, TOKEN]
                times[row, place] = likeliest_times(states, header, state)
                recent[row, place] = text_at(words, header, states[state, RECENT] + 1)
                state_of[row, place] = state
                place += 1
            state = states[state, LINK]
            matched = states[state, LENGTH]


@kernel
def gather_edges(
    words: Int32, edges: Int32, states: Int32, state: int, found_tokens: Int32, found_targets: Int32
) -> int:
    """Write up to `len(found_tokens)` edges of a state; return how many.

    A state that is none, from a caller that kept it too long, gives nonsense, but it ends, and reads nothing outside of
    `words`.
    """
    if states[state, TOKEN] == NO_TOKEN:
        return 0
    if states[state, EDGES] == 0:
        found_tokens[0] = states[state, TOKEN]
        found_targets[0] = states[state, TARGET]
        return 1
    found = 0
    # Depth first: at most 8 index nodes deep, 15 siblings left at each.
    stack = np.empty(8 * FANOUT_MASK + 1, np.int64)
    stack[0] = states[state, EDGES]
    depth = 1
    for _ in range(len(edges)):
        if depth == 0:
            break
        depth -= 1
        reference = stack[depth]
        if reference & KIND_MASK == INDEX_KIND:
            base = (reference >> KIND_BITS) * UNIT_WORDS
            if not 0 <= base <= len(words) - FANOUT_MASK - 1:
                continue
            for child in range(FANOUT_MASK + 1):
                if words[base + child] != 0 and depth < len(stack):
                    stack[depth] = words[base + child]
                    depth += 1
            continue
        if not 0 <= first_edge(reference) <= last_edge(reference) < len(edges):
            continue
        for edge in range(first_edge(reference), last_edge(reference) + 1):
            if edges[edge, 0] != NO_TOKEN:
                if found == len(found_tokens):
                    return found
                found_tokens[found] = edges[edge, 0]
                found_targets[found] = edges[edge, 1]
                found += 1
    return found


@kernel
def continuations_batch(
    words: Int32, sequences: Int32, slots: Int64, states_of: Int32, limit: int
) -> tuple[Int32, Int32, Int64]:
    """Ragged tokens, counts and offsets of what followed `states_of[i]` in the text `slots[i]`."""
    states = words.reshape(-1, STATE_WORDS)
    edges = words.reshape(-1, 2)
    tokens = np.empty(len(slots) * limit, np.int32)
    counts = np.empty(len(slots) * limit, np.int32)
    offsets = np.zeros(len(slots) + 1, np.int64)
    found_tokens = np.empty(16 * limit, np.int32)
    found_targets = np.empty(16 * limit, np.int32)
    used = 0
    for row in range(len(slots)):
        header = sequences[slots[row]]
        found = gather_edges(words, edges, states, states_of[row], found_tokens, found_targets)
        last = -1 if header[HEAD_LENGTH] == 0 else text_at(words, header, header[HEAD_LENGTH] - 1)
        # One number a continuation, so that a sort orders by count, then by token.
        ranks = np.empty(found, np.int64)
        for i in range(found):
            if not 0 <= found_targets[i] < len(states):
                found_targets[i] = 0
            times = np.int64(states[found_targets[i], COUNT])
            if found_tokens[i] == last and ends_text(states, header, found_targets[i]):
                times += 1
            ranks[i] = (-times << 32) | found_tokens[i]
        ranks.sort()
        for i in range(min(found, limit)):
            tokens[used] = ranks[i] & 0xFFFFFFFF
            counts[used] = -(ranks[i] >> 32)
            used += 1
        offsets[row + 1] = used
    return tokens[:used].copy(), counts[:used].copy(), offsets
