"""Kernels that grow one sequence's suffix automaton by a token.

The construction is that of Blumer et al. (1985, "The smallest automaton recognizing the subwords of a text"). What is
added is statistics kept while it runs. Appending token c after position i walks the suffix links of the last state:
those states are exactly the contexts that end at i, and c is what follows them, so the walk counts each context
(`COUNT`, `RECENT`) and moves its likeliest continuation (`TOKEN`) where c has caught up. How often c has followed a
context is the occurrence count of the state that the edge leads to; those targets lie, in the same order, on the suffix
links of the new state, so a second pointer finds them without a lookup.

The statistics' walk stops after `CHAIN_CAP` states. In text whose suffix chain is deeper (long runs or short periods)
the counts of the shortest contexts are then too low; structure, lengths and longest match are exact always.
"""

from __future__ import annotations

from freedraft.retrieval.borrowing import borrowed
from freedraft.retrieval.edges import (
    BEST_BITS,
    BEST_MAX,
    COUNT,
    EDGES,
    LENGTH,
    LINK,
    NO_TOKEN,
    ORIGIN,
    RECENT,
    STATE_WORDS,
    TARGET,
    TOKEN,
    add_edge,
    copy_set,
    find_edge,
    redirect_edge,
)
from freedraft.retrieval.jit import kernel
from freedraft.retrieval.memory import (
    HEAD_MEMORY_FIELDS,
    PAGE_WORDS,
    POOL_FREE_SLOT,
    POOL_MAX_LENGTH,
    RANK_32,
    UNIT_WORDS,
    allocate,
    release_pages,
    take_page,
)
from freedraft.retrieval.ragged import Int32, Int64

CHAIN_CAP = 32

# Fields of a sequence's header, after those of `memory`.
HEAD_OPEN = HEAD_MEMORY_FIELDS
HEAD_ROOT = HEAD_OPEN + 1
HEAD_LAST = HEAD_OPEN + 2  # the state of the whole text
HEAD_MATCH = HEAD_OPEN + 3  # the state of the longest suffix that occurred before; 0 = the sequence holds nothing
HEAD_MATCH_LENGTH = HEAD_OPEN + 4
HEAD_LENGTH = HEAD_OPEN + 5  # tokens learnt
HEAD_LEARNING = HEAD_OPEN + 6
HEAD_NEXT_SLOT = HEAD_OPEN + 7
HEAD_SPARE = HEAD_OPEN + 8  # a state kept for the clone that the last token learnt may need
HEAD_TEXT = HEAD_OPEN + 9  # from here on: the pages of the text, PAGE_WORDS tokens each

BAD_SLOT, BAD_TOKEN, FINE = -2, -1, 0


@kernel
def is_open(sequences: Int32, slot: int) -> bool:
    """Whether `slot` names an open sequence; safe for any number."""
    return 0 <= slot < len(sequences) and sequences[slot, HEAD_OPEN] == 1


@kernel
def new_state(
    words: Int32, states: Int32, pool: Int32, next_page: Int32, header: Int32, length: int, origin: int
) -> int:
    """Return a state with no edges, its link the root, or 0 when the arena is full."""
    unit = allocate(words, pool, next_page, header, RANK_32)
    if unit == 0:
        return 0
    state = unit * UNIT_WORDS // STATE_WORDS
    states[state, LENGTH] = length
    states[state, LINK] = header[HEAD_ROOT]
    states[state, COUNT] = 0
    states[state, RECENT] = -1
    states[state, TOKEN] = NO_TOKEN
    states[state, TARGET] = 0
    states[state, ORIGIN] = origin << BEST_BITS
    states[state, EDGES] = 0
    return state


@kernel
def clone_state(
    words: Int32,
    states: Int32,
    edges: Int32,
    pool: Int32,
    next_page: Int32,
    header: Int32,
    state: int,
    length: int,
) -> int:
    """Return a copy of `state` for its strings of up to `length` tokens, or 0 when the arena is full."""
    clone = new_state(words, states, pool, next_page, header, length, 0)
    if clone == 0:
        return 0
    if states[state, EDGES] != 0:
        copied = copy_set(words, edges, pool, next_page, header, states[state, EDGES])
        if copied == 0:
            return 0
        states[clone, EDGES] = copied
    for field in (LINK, COUNT, RECENT, TOKEN, TARGET, ORIGIN):
        states[clone, field] = states[state, field]
    return clone


@kernel
def last_clone(states: Int32, header: Int32, state: int, length: int) -> int:
    """Return a clone of `state` from the block kept for it, for a sequence that stops: it shares the edges."""
    clone = header[HEAD_SPARE]
    for field in range(STATE_WORDS):
        states[clone, field] = states[state, field]
    states[clone, LENGTH] = length
    return clone


@kernel
def note_continuation(states: Int32, state: int, token: int, target: int, times: int) -> None:
    """Record that `token`, leading to `target`, has now followed `state` `times` times."""
    origin = states[state, ORIGIN]
    if states[state, TOKEN] != token:
        best = origin & BEST_MAX
        if best == BEST_MAX:
            best = states[states[state, TARGET], COUNT]
        if times < best:
            return
        states[state, TOKEN] = token
        states[state, TARGET] = target
    states[state, ORIGIN] = (origin & ~BEST_MAX) | min(times, BEST_MAX)


@kernel
def link_in(
    words: Int32,
    states: Int32,
    edges: Int32,
    pool: Int32,
    next_page: Int32,
    header: Int32,
    last: int,
    current: int,
    token: int,
    recent: int,
    strand: bool,
) -> int:
    """Let `token` follow state `last`, the end of a text so far.

    Args:
        last: the state.
        current: a new state for the text with the token; 0 where an edge leads to one already, which only several
            strands in one automaton can have.
        recent: what `RECENT` becomes for the contexts that end here.
        strand: other texts grow in the same automaton.

    Returns:
        The state of the text with the token.
    """
    # The contexts that token never followed: each gets an edge to the new state.
    state = last
    steps = 0
    target = 0
    while state != 0:
        if steps < CHAIN_CAP:
            states[state, COUNT] += 1
            states[state, RECENT] = recent
        target = find_edge(words, states, edges, state, token)
        if target != 0:
            break
        if header[HEAD_LEARNING] != 0:
            if not add_edge(words, states, edges, pool, next_page, header, state, token, current):
                header[HEAD_LEARNING] = 0
            elif steps < CHAIN_CAP:
                note_continuation(states, state, token, current, 1)
        steps += 1
        state = states[state, LINK]

    if target != 0:
        if states[target, LENGTH] != states[state, LENGTH] + 1:
            # target holds longer strings too, which did not occur here: split off the short ones.
            clone = 0
            if header[HEAD_LEARNING] != 0:
                clone = clone_state(words, states, edges, pool, next_page, header, target, states[state, LENGTH] + 1)
            if clone == 0:
                header[HEAD_LEARNING] = 0
                clone = last_clone(states, header, target, states[state, LENGTH] + 1)
            states[target, LINK] = clone
            context = state
            while context != 0 and find_edge(words, states, edges, context, token) == target:
                redirect_edge(words, states, edges, context, token, clone)
                context = states[context, LINK]
            target = clone
        if current == 0:
            current = target
        else:
            states[current, LINK] = target
        # The contexts that token has followed before; the first of them is counted already.
        note_continuation(states, state, token, target, times_with(states, state, token, target, strand))
        state = states[state, LINK]
        steps += 1
        while state != 0 and steps < CHAIN_CAP:
            states[state, COUNT] += 1
            states[state, RECENT] = recent
            while states[states[target, LINK], LENGTH] > states[state, LENGTH]:
                target = states[target, LINK]
            note_continuation(states, state, token, target, times_with(states, state, token, target, strand))
            state = states[state, LINK]
            steps += 1
    return current


@kernel
def times_with(states: Int32, state: int, token: int, target: int, strand: bool) -> int:
    """How often `token`, leading to `target`, has followed `state`, this time included.

    The occurrence that ends a text is not counted in its state yet. Of strands several may end there, so that the
    number may be too low by one for each of the others; not so where `token` is the likeliest anyway, as in lockstep.
    """
    times = states[target, COUNT] + 1
    if strand and states[state, TOKEN] == token:
        return max(times, (states[state, ORIGIN] & BEST_MAX) + 1)
    return times


@kernel
def learn_token(
    words: Int32, states: Int32, edges: Int32, pool: Int32, next_page: Int32, header: Int32, token: int
) -> bool:
    """Append a token to a learning sequence; return False, with nothing changed, when it can learn no more.

    Where the arena is full half-way, the token is learnt as far as there is room, and is the last.
    """
    position = header[HEAD_LENGTH]
    if position == pool[POOL_MAX_LENGTH]:
        return False
    if position % PAGE_WORDS == 0:
        page = take_page(pool, next_page, header)
        if page == 0:
            return False
        header[HEAD_TEXT + position // PAGE_WORDS] = page
    current = new_state(words, states, pool, next_page, header, position + 1, position)
    if current == 0:
        return False
    words[header[HEAD_TEXT + position // PAGE_WORDS] * PAGE_WORDS + position % PAGE_WORDS] = token
    header[HEAD_LENGTH] = position + 1

    link_in(words, states, edges, pool, next_page, header, header[HEAD_LAST], current, token, position - 1, False)
    header[HEAD_LAST] = current
    header[HEAD_MATCH] = states[current, LINK]
    header[HEAD_MATCH_LENGTH] = states[header[HEAD_MATCH], LENGTH]
    return True


@kernel
def learn_strand(
    words: Int32, states: Int32, edges: Int32, pool: Int32, next_page: Int32, header: Int32, end: int, token: int
) -> int:
    """Append a token to one of several strands: texts that grow side by side in one generalized suffix automaton.

    Source: Blumer et al. 1987, "Complete inverted files for efficient text retrieval and analysis", of whole texts;
    here any of them may go on at any time. A strand is named by the state of all of it, at first the root. No text is
    kept: `RECENT` is the token that followed last, in whichever strand, and `HEAD_MATCH` and the position in `ORIGIN`
    tell nothing. So such an automaton is for kernels alone, not for `SuffixAutomata.contexts`.

    Returns:
        The state of the strand with the token; 0, with nothing changed, when the automaton can learn no more.
    """
    if header[HEAD_LEARNING] == 0:
        return 0
    if header[HEAD_LENGTH] == pool[POOL_MAX_LENGTH]:
        header[HEAD_LEARNING] = 0
        return 0
    current = 0
    if find_edge(words, states, edges, end, token) == 0:
        length = states[end, LENGTH] + 1
        current = new_state(words, states, pool, next_page, header, length, header[HEAD_LENGTH])
        if current == 0:
            header[HEAD_LEARNING] = 0
            return 0
    header[HEAD_LENGTH] += 1
    return link_in(words, states, edges, pool, next_page, header, end, current, token, token, True)


@kernel
def follow_token(words: Int32, states: Int32, edges: Int32, header: Int32, token: int) -> None:
    """Move the match of a sequence that has stopped learning past a token."""
    state = header[HEAD_MATCH]
    length = header[HEAD_MATCH_LENGTH]
    while state != 0:
        target = find_edge(words, states, edges, state, token)
        if target != 0:
            state = target
            length += 1
            break
        state = states[state, LINK]
        length = states[state, LENGTH]
    if state == 0:
        state = header[HEAD_ROOT]
        length = 0
    # The end of what was learnt has no continuation; a shorter suffix of it has.
    while state != 0 and states[state, TOKEN] == NO_TOKEN:
        state = states[state, LINK]
        length = states[state, LENGTH]
    header[HEAD_MATCH] = state
    header[HEAD_MATCH_LENGTH] = length


@kernel
def extend_batch(
    words: Int32, pool: Int32, next_page: Int32, sequences: Int32, slots: Int64, tokens: Int32, offsets: Int64
) -> int:
    """Append a ragged batch; return FINE, or BAD_SLOT or BAD_TOKEN with nothing changed."""
    for slot in slots:
        if not is_open(sequences, slot):
            return BAD_SLOT
    for token in tokens:
        if token < 0:
            return BAD_TOKEN
    words, pool, next_page, sequences, slots, tokens, offsets = borrowed(
        (words, pool, next_page, sequences, slots, tokens, offsets)
    )
    states = words.reshape(-1, STATE_WORDS)
    edges = words.reshape(-1, 2)
    for row in range(len(slots)):
        header = sequences[slots[row]]
        for i in range(offsets[row], offsets[row + 1]):
            token = tokens[i]
            if header[HEAD_LEARNING] != 0:
                if learn_token(words, states, edges, pool, next_page, header, token):
                    continue
                header[HEAD_LEARNING] = 0
            follow_token(words, states, edges, header, token)
    return FINE


@kernel
def open_batch(words: Int32, pool: Int32, next_page: Int32, sequences: Int32, slots: Int64) -> None:
    """Start `len(slots)` empty sequences in free slots, which the caller has made sure there are; fills `slots`."""
    states = words.reshape(-1, STATE_WORDS)
    for row in range(len(slots)):
        slot = pool[POOL_FREE_SLOT]
        header = sequences[slot]
        pool[POOL_FREE_SLOT] = header[HEAD_NEXT_SLOT]
        slots[row] = slot
        header[:] = 0
        header[HEAD_OPEN] = 1
        root = new_state(words, states, pool, next_page, header, 0, -1)
        # The second lies in the page of the first, so that there is room for it.
        if root != 0:
            states[root, LINK] = 0
            header[HEAD_SPARE] = new_state(words, states, pool, next_page, header, 0, -1)
            header[HEAD_LEARNING] = 1
            header[HEAD_ROOT] = root
            header[HEAD_LAST] = root
            header[HEAD_MATCH] = root


@kernel
def close_batch(pool: Int32, next_page: Int32, sequences: Int32, slots: Int64) -> int:
    """End sequences; return FINE, or BAD_SLOT with nothing changed."""
    for row in range(len(slots)):
        slot = slots[row]
        if not is_open(sequences, slot):
            for undone in range(row):
                sequences[slots[undone], HEAD_OPEN] = 1
            return BAD_SLOT
        # A mark, so that the same slot twice in one call is found.
        sequences[slot, HEAD_OPEN] = 2
    for slot in slots:
        header = sequences[slot]
        release_pages(pool, next_page, header)
        header[HEAD_OPEN] = 0
        header[HEAD_NEXT_SLOT] = pool[POOL_FREE_SLOT]
        pool[POOL_FREE_SLOT] = slot
    return FINE


@kernel
def text_at(words: Int32, header: Int32, position: int) -> int:
    """The token at a position of the learnt text."""
    return words[header[HEAD_TEXT + position // PAGE_WORDS] * PAGE_WORDS + position % PAGE_WORDS]
