"""The kernels of fusion: draft the likeliest chain by all evidence, and learn from what is committed."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from freedraft.plugins.adjacency import Table, push_token
from freedraft.plugins.evidence import COLUMNS, MAX_CONTEXTS, count_single
from freedraft.plugins.indirect import gather_indirect, learn_indirect
from freedraft.plugins.judging import (
    NOT_DRAFTED,
    NOT_STARTED,
    ROOT,
    Judged,
    begin_reply,
    being_written,
    foreseen,
    judge,
    kind_of,
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
    Places,
    advance_own,
    begin,
    count_corpora,
    count_texts,
    follow_corpora,
    follow_others,
    gather_corpora,
    gather_texts,
    new_cursors,
    put_back,
    take_up,
)
from freedraft.retrieval.borrowing import borrowed, hold
from freedraft.retrieval.edges import STATE_WORDS
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
from freedraft.retrieval.index.follow import Automaton
from freedraft.retrieval.jit import kernel
from freedraft.retrieval.ragged import Float32, Int32, Int64, UInt8


class Workspace(NamedTuple):
    """Room to draft for one sequence after the other.

    Attributes:
        evidence: int64 `(MAX_CONTEXTS, COLUMNS)`.
        candidates: of a position.
        texts, cursors, in_corpora: see `new_cursors`.
        at: int64 `(S, 2)`, where a sequence is in what S drafters propose.
    """

    evidence: Int64
    candidates: Candidates
    texts: Int64
    cursors: Int64
    in_corpora: Int32
    at: Int64


@kernel
def workspace(places: Places, proposals: Proposals) -> Workspace:
    """Room, all of it undefined."""
    texts, cursors, in_corpora = new_cursors(places)
    evidence = np.empty((MAX_CONTEXTS, COLUMNS), np.int64)
    at = np.empty((proposals.nodes.shape[1], 2), np.int64)
    return Workspace(evidence, room(), texts, cursors, in_corpora, at)


@kernel
def weigh(
    words: Int32,
    states: Int32,
    edges: Int32,
    sequences: Int32,
    corpora: tuple[Automaton, ...],
    damaged: Int64,
    successors: Int32,
    table: Table,
    ranking: bool,
    owner: int,
    wide: bool,
    proposals: Proposals,
    mixer: Mixer,
    texts: Int64,
    cursors: Int64,
    in_corpora: Int32,
    context: Int32,
    at: Int64,
    last: int,
    evidence: Int64,
    candidates: Candidates,
) -> tuple[int, int]:
    """Gather the evidence at a place in all texts, and mix it to a probability for each candidate of the next token.

    Args:
        ranking: whether rankings are used.
        owner: of what the sequence reads in `successors` and `table`.
        wide: whether all that ranked high is a candidate, for a tree, or only the likeliest.
        at: where the place is in the proposals for the sequence.
        last: the token right before the place.

    Returns:
        Rows of `evidence`, and candidates.
    """
    rows = gather_texts(words, states, sequences, texts, cursors, evidence)
    rows = gather_indirect(successors, owner, evidence, rows)
    # Corpora can be many: some rows are kept for what comes behind them.
    kept = (CONTEXT if ranking else 0) + CHILDREN * len(at)
    rows = gather_corpora(corpora, damaged, in_corpora, evidence[: len(evidence) - kept], rows)
    if ranking:
        rows = gather_rankings(table, owner, context, evidence, rows)
    rows = gather_proposals(proposals, texts[0], at, evidence, rows)
    found = find_candidates(evidence, rows, candidates)
    if ranking and wide:
        found = add_ranked(table, evidence, rows, candidates.tokens, found)
    if found > 0:
        tokens_found = candidates.tokens[:found]
        count_texts(words, states, edges, evidence, rows, tokens_found, candidates.times)
        count_corpora(corpora, evidence, rows, tokens_found, candidates.times)
        if ranking:
            count_rankings(table, evidence, rows, tokens_found, candidates.times)
        count_single(evidence, rows, tokens_found, candidates.times)
        predict(evidence, rows, mixer, candidates, found, last)
    return rows, found


@kernel
def extend_batch(
    words: Int32,
    pool: Int32,
    next_page: Int32,
    sequences: Int32,
    generations: Int64,
    corpora: tuple[Automaton, ...],
    damaged: Int64,
    places: Places,
    judged: Judged,
    taken_in: TakenIn,
    successors: Int32,
    table: Table,
    rankings: Rankings,
    proposals: Proposals,
    mixer: Mixer,
    wide: bool,
    slots: Int64,
    tokens: Int32,
    offsets: Int64,
) -> int:
    """Append a ragged batch, learning from it where the reply has begun; FINE, or BAD_SLOT or BAD_TOKEN.

    Args:
        wide: as in `weigh`, and as the drafts are made.
    """
    for slot in slots:
        if not is_open(sequences, slot):
            return BAD_SLOT
    for token in tokens:
        if token < 0:
            return BAD_TOKEN
    words, pool, next_page, sequences, generations, corpora, damaged, places, judged, taken_in = borrowed(
        (words, pool, next_page, sequences, generations, corpora, damaged, places, judged, taken_in)
    )
    successors, table, rankings, proposals, mixer, slots, tokens, offsets = borrowed(
        (successors, table, rankings, proposals, mixer, slots, tokens, offsets)
    )
    states = words.reshape(-1, STATE_WORDS)
    edges = words.reshape(-1, 2)
    work = workspace(places, proposals)
    evidence, candidates, texts, cursors, in_corpora, at = borrowed(work)
    ranking = rankings.ranked.shape[1] > 0
    together = generations[0] >= 0 and 1 < being_written(judged) <= MOST_WRITTEN
    for row in range(len(slots)):
        slot = slots[row]
        own = sequences[slot]
        replying = judged.started[slot] >= 0
        node = ROOT if replying else NOT_DRAFTED
        owner = judged.owner[slot]
        context = rankings.context[slot].copy()
        last = judged.last[slot]
        if replying:
            take_up(states, sequences, generations, places, slot, texts, cursors, in_corpora)
            to_start(proposals, slot, at)
        for i in range(offsets[row], offsets[row + 1]):
            token = tokens[i]
            if replying:
                if node != NOT_DRAFTED:
                    node = judge(mixer, judged, slot, i - offsets[row], node, token)
                cursors[0, 0], cursors[0, 1] = own[HEAD_MATCH], own[HEAD_MATCH_LENGTH]
                rows, found = weigh(
                    words, states, edges, sequences, corpora, damaged, successors, table, ranking, owner, wide,
                    proposals, mixer, texts, cursors, in_corpora, context, at, last, evidence, candidates,
                )  # fmt: skip
                foreseen(judged, slot, evidence, rows, candidates, found, token)
                if found > 0:
                    learn(evidence, rows, mixer, candidates, found, last, token)
                learn_indirect(successors, owner, evidence, rows, token)
            learning = own[HEAD_LEARNING] != 0
            if not (learning and learn_token(words, states, edges, pool, next_page, own, token)):
                own[HEAD_LEARNING] = 0
                follow_token(words, states, edges, own, token)
            if replying:
                follow_others(words, states, edges, sequences, texts, cursors, token)
                follow_corpora(corpora, damaged, in_corpora, token)
                follow_proposals(proposals, slot, at, token)
            if ranking:
                push_token(context, token)
            last = int(token)
        judged.last[slot] = last
        if replying:
            put_back(places, slot, cursors, in_corpora)
            if together:
                take_in(
                    words, states, edges, pool, next_page, sequences, generations[0], slot, judged.started[slot],
                    taken_in, AT_ONCE,
                )  # fmt: skip
        if ranking:
            learn_rankings(table, rankings, owner, slot, judged.tokens[slot], judged.parents[slot])
            rankings.context[slot] = context
        judged.considered[slot] = 0
    hold(work)
    return FINE


@kernel
def draft_batch(
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
    """Write the likeliest chain of each sequence; FINE, or BAD_SLOT."""
    words, sequences, generations, corpora, damaged, places, judged, successors, table = borrowed(
        (words, sequences, generations, corpora, damaged, places, judged, successors, table)
    )
    rankings, proposals, mixer, sources, slots, budget, tokens, parents, probability, source, offsets = borrowed(
        (rankings, proposals, mixer, sources, slots, budget, tokens, parents, probability, source, offsets)
    )
    states = words.reshape(-1, STATE_WORDS)
    edges = words.reshape(-1, 2)
    work = workspace(places, proposals)
    evidence, candidates, texts, cursors, in_corpora, at = borrowed(work)
    ranking = rankings.ranked.shape[1] > 0
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
        to_start(proposals, slot, at)
        owner = judged.owner[slot]
        context = rankings.context[slot].copy()
        last = judged.last[slot]
        likelihood = 1.0
        depth = 0
        most = min(longest, budget[row])
        judged.considered[slot] = 0
        judged.drafted_run[slot] = judged.run[slot]
        while depth < most:
            rows, found = weigh(
                words, states, edges, sequences, corpora, damaged, successors, table, ranking, owner, False,
                proposals, mixer, texts, cursors, in_corpora, context, at, last, evidence, candidates,
            )  # fmt: skip
            if found == 0:
                break
            best = likeliest(candidates, found)
            token = candidates.tokens[best]
            kind = kind_of(evidence, rows, token)
            mixed = trusted(judged, slot, kind, candidates.mixed[best])
            judged.tokens[slot, depth] = token
            judged.parents[slot, depth] = depth - 1
            judged.mixed[slot, depth] = mixed
            judged.considered[slot] = depth + 1
            likelihood *= correct(mixer, judged.run[slot] + depth, mixed)
            if likelihood < min_probability:
                break
            tokens[used] = token
            parents[used] = depth - 1
            probability[used] = likelihood
            source[used] = sources[kind]
            used += 1
            depth += 1
            last = token
            if depth < most:
                advance_own(words, states, edges, sequences, texts, cursors, token)
                follow_others(words, states, edges, sequences, texts, cursors, token)
                follow_corpora(corpora, damaged, in_corpora, token)
                follow_proposals(proposals, slot, at, token)
                if ranking:
                    push_token(context, token)
        offsets[row + 1] = used
    hold(work)
    return FINE
