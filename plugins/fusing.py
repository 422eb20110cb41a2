"""The kernels of fusion: draft the likeliest chain by all evidence, and learn from what is committed."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from freedraft.plugins.adjacency import MAX_CONTEXT, Table, push_token
from freedraft.plugins.evidence import COLUMNS, MAX_CONTEXTS, count_single
from freedraft.plugins.indirect import gather_indirect, learn_indirect
from freedraft.plugins.judging import (
    NOT_DRAFTED,
    NOT_STARTED,
    ROOT,
    Judged,
    begin_reply,
    foreseen,
    foreseen_in_draft,
    is_learnt_from,
    judge,
    kind_of,
    replies_among,
    trusted,
)
from freedraft.plugins.mixing import Candidates, Mixer, correct, find_candidates, learn, likeliest, predict, room
from freedraft.plugins.proposals import (
    CHILDREN,
    Proposals,
    follow_proposals,
    gather_proposals,
    to_start,
)
from freedraft.plugins.rankings import CONTEXT, Rankings, add_ranked, count_rankings, gather_rankings, learn_rankings
from freedraft.plugins.responses import AT_ONCE, MOST_WRITTEN, TakenIn, take_in
from freedraft.plugins.texts import (
    Library,
    advance_own,
    begin,
    count_corpora,
    count_texts,
    follow_corpora,
    follow_others,
    gather_corpora,
    gather_own,
    gather_texts,
    new_cursors,
    put_back,
    take_up,
)
from freedraft.retrieval.borrowing import borrowed, hold
from freedraft.retrieval.growth import (
    BAD_SLOT,
    BAD_TOKEN,
    FINE,
    HEAD_LEARNING,
    HEAD_LENGTH,
    HEAD_MATCH,
    HEAD_MATCH_LENGTH,
    follow_token,
    is_open,
    learn_token,
)
from freedraft.retrieval.jit import kernel
from freedraft.retrieval.lending import Lent
from freedraft.retrieval.ragged import Float32, Int32, Int64, UInt8


class Learnt(NamedTuple):
    """What fusion has learnt, and what it keeps of each sequence to learn more.

    Attributes:
        judged: of each sequence.
        taken_in: how much of its reply is a source already.
        successors: see `indirect`.
        table: what the target ranked where.
        rankings: of each sequence, to learn that.
        proposals: what other drafters draft for it.
        mixer: the predictor.
    """

    judged: Judged
    taken_in: TakenIn
    successors: Int32
    table: Table
    rankings: Rankings
    proposals: Proposals
    mixer: Mixer


class Place(NamedTuple):
    """Where one sequence, or a draft of it, is in everything it is drafted from.

    Attributes:
        texts, cursors, in_corpora: see `new_cursors`.
        context: int32 `(MAX_CONTEXT,)`, the newest tokens, newest first.
        at: int64 `(S, 2)`, in what S drafters propose.
    """

    texts: Int64
    cursors: Int64
    in_corpora: Int32
    context: Int32
    at: Int64


class Workspace(NamedTuple):
    """Room to weigh one place after the other.

    Attributes:
        evidence: int64 `(MAX_CONTEXTS, COLUMNS)`.
        candidates: of a position.
    """

    evidence: Int64
    candidates: Candidates


class Drafted(NamedTuple):
    """Room for the parts of `Drafts`, with `longest` nodes for each row."""

    tokens: Int32
    parents: Int32
    probability: Float32
    source: UInt8
    offsets: Int64


@kernel
def lend(library: Library, learnt: Learnt) -> Lent[tuple[Library, Learnt]]:
    """Lend the arrays to the kernels that are called at every step; as dear as a call with them."""
    return Lent((library, learnt))


@kernel
def new_place(library: Library, learnt: Learnt) -> Place:
    """Room for a place, all of it undefined."""
    texts, cursors, in_corpora = new_cursors(library.places)
    at = np.empty((learnt.proposals.nodes.shape[1], 2), np.int64)
    return Place(texts, cursors, in_corpora, np.empty(MAX_CONTEXT, np.int32), at)


@kernel
def workspace() -> Workspace:
    """Room, all of it undefined."""
    return Workspace(np.empty((MAX_CONTEXTS, COLUMNS), np.int64), room())


@kernel
def uses_rankings(learnt: Learnt) -> bool:
    """Whether what the target ranked is evidence."""
    return learnt.rankings.ranked.shape[1] > 0


@kernel
def all_open(library: Library, slots: Int64) -> bool:
    """Whether all slots are of sequences."""
    every = True
    for slot in slots:
        every &= is_open(library.sequences, slot)
    return every


@kernel
def go_to(library: Library, learnt: Learnt, slot: int, place: Place) -> None:
    """Go to the end of what is committed of a sequence."""
    take_up(
        library.states, library.sequences, library.generations, library.places, slot, place.texts, place.cursors,
        place.in_corpora,
    )  # fmt: skip
    place.context[:] = learnt.rankings.context[slot]
    to_start(learnt.proposals, slot, place.at)


@kernel
def go_to_draft(library: Library, learnt: Learnt, slot: int, place: Place) -> None:
    """The same, before a draft: the first one begins a reply."""
    judged = learnt.judged
    if judged.started[slot] == NOT_STARTED:
        begin_reply(judged, slot, library.sequences[slot, HEAD_LENGTH])
        begin(
            library.words, library.states, library.edges, library.sequences, library.generations, library.corpora,
            library.damaged, library.places, slot,
        )  # fmt: skip
    go_to(library, learnt, slot, place)
    judged.considered[slot] = 0
    judged.drafted_run[slot] = judged.run[slot]


@kernel
def go_on(library: Library, learnt: Learnt, slot: int, place: Place, token: int) -> None:
    """Go past a token in everything but the own text."""
    follow_others(
        library.words, library.states, library.edges, library.sequences, place.texts, place.cursors, token
    )  # fmt: skip
    follow_corpora(library.corpora, library.damaged, place.in_corpora, token)
    follow_proposals(learnt.proposals, slot, place.at, token)
    if uses_rankings(learnt):
        push_token(place.context, token)


@kernel
def go_past(library: Library, learnt: Learnt, slot: int, place: Place, token: int) -> None:
    """Go past a draft token."""
    advance_own(
        library.words, library.states, library.edges, library.sequences, place.texts, place.cursors, token
    )  # fmt: skip
    go_on(library, learnt, slot, place, token)


@kernel
def weigh(
    library: Library, learnt: Learnt, slot: int, place: Place, last: int, wide: bool, work: Workspace
) -> tuple[int, int]:
    """Gather the evidence at a place, and mix it to a probability for each candidate of the next token.

    Args:
        slot: of the sequence.
        last: the token right before the place.
        wide: whether all that ranked high is a candidate, for a tree, or only the likeliest.
        work: filled.

    Returns:
        Rows of evidence, and candidates.
    """
    evidence, candidates = work.evidence, work.candidates
    ranking = uses_rankings(learnt)
    owner = learnt.judged.owner[slot]
    rows = gather_texts(library.words, library.states, library.sequences, place.texts, place.cursors, evidence)
    rows = gather_indirect(learnt.successors, owner, evidence, rows)
    # Corpora can be many: some rows are kept for what comes behind them.
    kept = (CONTEXT if ranking else 0) + CHILDREN * len(place.at)
    most = len(evidence) - kept
    rows = gather_corpora(library.corpora, library.damaged, place.in_corpora, evidence[:most], rows)
    if ranking:
        rows = gather_rankings(learnt.table, owner, place.context, evidence, rows)
    rows = gather_proposals(learnt.proposals, slot, place.at, evidence, rows)
    found = find_candidates(evidence, rows, candidates)
    if ranking and wide:
        found = add_ranked(learnt.table, evidence, rows, candidates.tokens, found)
    if found > 0:
        tokens = candidates.tokens[:found]
        count_texts(library.words, library.states, library.edges, evidence, rows, tokens, candidates.times)
        count_corpora(library.corpora, evidence, rows, tokens, candidates.times)
        if ranking:
            count_rankings(learnt.table, evidence, rows, tokens, candidates.times)
        count_single(evidence, rows, tokens, candidates.times)
        predict(evidence, rows, learnt.mixer, candidates, found, last)
    return rows, found


@kernel
def extend_batch(texts: Lent[tuple[Library, Learnt]], wide: bool, slots: Int64, tokens: Int32, offsets: Int64) -> int:
    """Append a ragged batch, learning from it where the reply has begun; FINE, or BAD_SLOT or BAD_TOKEN.

    Replies that go on in the same call are a source for one another.

    Args:
        texts: with what was learnt.
        wide: as in `weigh`, and as the drafts are made.
    """
    library, learnt = borrowed(texts.arrays)
    for token in tokens:
        if token < 0:
            return BAD_TOKEN if all_open(library, slots) else BAD_SLOT
    if not all_open(library, slots):
        return BAD_SLOT
    slots, tokens, offsets = borrowed((slots, tokens, offsets))
    words, pool, next_page = library.words, library.pool, library.next_page
    states, edges, sequences = library.states, library.edges, library.sequences
    judged, mixer = learnt.judged, learnt.mixer
    room_made = (new_place(library, learnt), workspace())
    place, work = borrowed(room_made)
    replies = replies_among(judged, slots)
    together = library.generations[0] >= 0 and 1 < replies <= MOST_WRITTEN
    for row in range(len(slots)):
        slot = slots[row]
        own = sequences[slot]
        replying = judged.started[slot] >= 0
        node = ROOT if replying else NOT_DRAFTED
        last = judged.last[slot]
        learning = is_learnt_from(slot, own[HEAD_LENGTH], replies)
        if replying:
            go_to(library, learnt, slot, place)
        else:
            place.context[:] = learnt.rankings.context[slot]
        for i in range(offsets[row], offsets[row + 1]):
            token = tokens[i]
            if replying:
                place.cursors[0, 0], place.cursors[0, 1] = own[HEAD_MATCH], own[HEAD_MATCH_LENGTH]
                # What the draft has weighed is weighed again only for the mixer to learn from it.
                if learning or not foreseen_in_draft(judged, slot, node, token):
                    rows, found = weigh(library, learnt, slot, place, last, wide, work)
                    foreseen(judged, slot, work.evidence, rows, work.candidates, found, token)
                    if learning and found > 0:
                        learn(work.evidence, rows, mixer, work.candidates, found, last, token)
                else:
                    rows = gather_own(words, states, own, place.cursors, work.evidence[:1])
                learn_indirect(learnt.successors, judged.owner[slot], work.evidence, rows, token)
                if node != NOT_DRAFTED:
                    node = judge(mixer, judged, slot, i - offsets[row], node, token)
            grows = own[HEAD_LEARNING] != 0
            if not (grows and learn_token(words, states, edges, pool, next_page, own, token)):
                own[HEAD_LEARNING] = 0
                follow_token(words, states, edges, own, token)
            if replying:
                go_on(library, learnt, slot, place, token)
            elif uses_rankings(learnt):
                push_token(place.context, token)
            last = int(token)
        judged.last[slot] = last
        if replying:
            put_back(library.places, slot, place.cursors, place.in_corpora)
            if together:
                take_in(
                    words, states, edges, pool, next_page, sequences, library.generations[0], slot,
                    judged.started[slot], learnt.taken_in, AT_ONCE,
                )  # fmt: skip
        if uses_rankings(learnt):
            learn_rankings(
                learnt.table, learnt.rankings, judged.owner[slot], slot, judged.tokens[slot], judged.parents[slot]
            )  # fmt: skip
            learnt.rankings.context[slot] = place.context
        judged.considered[slot] = 0
    hold(room_made)
    return FINE


@kernel
def draft_batch(
    texts: Lent[tuple[Library, Learnt]],
    sources: UInt8,
    slots: Int64,
    budget: Int32,
    longest: int,
    min_probability: float,
    drafted: Drafted,
) -> int:
    """Write the likeliest chain of each sequence; FINE, or BAD_SLOT.

    Args:
        texts: with what was learnt.
        sources: uint8, the `Source` of each kind of evidence.
        slots: int64 `(n,)`.
        budget: int32 `(n,)`, nodes of each draft, at most, and none has more than `longest`.
        min_probability: a draft ends where the probability that all of it is accepted falls below this.
        drafted: filled.
    """
    library, learnt = borrowed(texts.arrays)
    if not all_open(library, slots):
        return BAD_SLOT
    sources, slots, budget, drafted = borrowed((sources, slots, budget, drafted))
    judged = learnt.judged
    room_made = (new_place(library, learnt), workspace())
    place, work = borrowed(room_made)
    used = 0
    drafted.offsets[0] = 0
    for row in range(len(slots)):
        slot = slots[row]
        go_to_draft(library, learnt, slot, place)
        last = judged.last[slot]
        likelihood = 1.0
        depth = 0
        most = min(longest, budget[row])
        while depth < most:
            rows, found = weigh(library, learnt, slot, place, last, False, work)
            if found == 0:
                break
            best = likeliest(work.candidates, found)
            token = work.candidates.tokens[best]
            kind = kind_of(work.evidence, rows, token)
            mixed = trusted(judged, slot, kind, work.candidates.mixed[best])
            judged.tokens[slot, depth] = token
            judged.parents[slot, depth] = depth - 1
            judged.mixed[slot, depth] = mixed
            judged.kinds[slot, depth] = kind
            judged.considered[slot] = depth + 1
            likelihood *= correct(learnt.mixer, judged.run[slot] + depth, mixed)
            if likelihood < min_probability:
                break
            drafted.tokens[used] = token
            drafted.parents[used] = depth - 1
            drafted.probability[used] = likelihood
            drafted.source[used] = sources[kind]
            used += 1
            depth += 1
            last = token
            if depth < most:
                go_past(library, learnt, slot, place, token)
        drafted.offsets[row + 1] = used
    hold(room_made)
    return FINE
