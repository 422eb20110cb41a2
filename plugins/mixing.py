"""A context-mixing predictor: from the evidence of many contexts to one calibrated probability a candidate.

As in PAQ-style compressors (Mahoney 2005, "Adaptive weighing of context models for lossless data compression"): each
context has a rate at which a token with such counts turned out right, learnt; the rates' log-odds are added up with
learnt weights. A weight is the sum of three, so that behind a line's end, say, or for a digit, a kind of context can
count for more or less than it does on the whole. Two adaptive probability maps then tell what such a sum has been worth
behind the same last token, and for the same candidate: some tokens, the rest of a word say, are foreseen better than
others. A last stage corrects the mean of the three by what it has been worth: behind as many tokens that were foreseen
in a row, and, until much is known of that, behind any number. Everything learns online, from the committed tokens, and
starts from what `start` derives from the escape estimate of `own_text`, so it is of use from the first.

    odds = bias + sum over contexts of (weight[longest match] + weight[last] + weight[token]) x stretch(rate)
    p(token) = correct(squash(mean(odds, stretch(map[last](odds)), stretch(map[token](odds))) + bias of the sequence))

`judging` has that bias, and how many tokens in a row were foreseen, by which the last stage tells copies from the rest.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from freedraft.plugins.evidence import (
    COUNTED,
    INDIRECT,
    KIND,
    KINDS,
    LATEST,
    LIKELIEST,
    MATCHED,
    MAX_CONTEXTS,
    PROPOSED,
    RANKED,
    SEEN,
    SEPARATOR,
)
from freedraft.plugins.own_text import ESCAPE
from freedraft.retrieval.jit import kernel
from freedraft.retrieval.ragged import Float32, Float64, Int32, Int64

# Buckets of a context: its length, how often it occurred, how often the token followed, whether it was the last to.
LENGTHS = np.array([1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 40], np.int64)  # upper ends; one more bucket above
SEENS = np.array([1, 2, 3, 5, 8, 16, 64], np.int64)  # likewise
LENGTH_BUCKETS = len(LENGTHS) + 1
SEEN_BUCKETS = len(SEENS) + 1
SHARE_BUCKETS = 10
RATES = KINDS * LENGTH_BUCKETS * SEEN_BUCKETS * SHARE_BUCKETS * 2
INPUTS = KINDS * LENGTH_BUCKETS
BIAS = INPUTS
BIAS_INPUT = 0.3

# How often a token at each place of a ranking was the next one, roughly; its share buckets count from the last place.
RANKED_RATES = np.array([0.01, 0.01, 0.012, 0.015, 0.02, 0.025, 0.04, 0.06, 0.12, 0.4])

# A proposal's share buckets are the upper ends of the probability that its drafter gives; 0 = not proposed. At first it
# is believed: rates start in the middle of each.
SHARES = np.array([0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9, 1.0])
PROPOSED_RATES = np.array([0.01, 0.01, 0.035, 0.075, 0.15, 0.27, 0.42, 0.6, 0.8, 0.95])

# Of an indirect context: its successor has the last share bucket, any other token the first.
INDIRECT_RATES = np.array([0.02] * (SHARE_BUCKETS - 1) + [0.1])

LIKELIEST_CANDIDATES = 6  # the likeliest tokens of the contexts, no more than this
MAX_CANDIDATES = 14  # and for trees the other tokens of rankings
# The first weights, by the bucket of the longest match: of contexts in that bucket, and of shorter ones. A long match
# must not be talked down by the short ones in it. Indirect contexts are counted by quarters, so most count as short.
LONGEST_WEIGHT = np.linspace(0.6, 0.8, LENGTH_BUCKETS)
SHORTER_WEIGHT = np.linspace(0.2, 0.1, LENGTH_BUCKETS)
BY_PRODUCT_WEIGHT = 0.3  # of rankings and proposals, however long
LEARNING_RATE = 0.01
TOKEN_LEARNING_RATE = 0.04  # of the weights by token
WEIGHT_TOKENS = 1024  # tokens that share an entry share these weights
BY_TOKEN = 2  # weights, and maps: by the last token, by the candidate
RATE_LIMIT = 255  # a rate remembers about as many observations
RATE_PRIOR = 8.0  # observations that the start of a rate counts for
LOWEST = 1.0 / 2048

# The maps: a rate for each log-odds, interpolated; tokens that share an entry share what is learnt.
MAP_TOKENS = 4096
MAP_STEPS = 17
MAP_RATE = 0.02
MAP_PRIOR = 2.0  # observations that the start of a map's rate counts for

# The last stage: a rate at each log-odds, interpolated, by how many tokens were foreseen in a row right before; and one
# for any number, which learns sooner and counts for as much as so many observations.
RUNS = np.array([0, 2, 7], np.int64)  # upper ends; one more bucket above
ANY_RUN = len(RUNS) + 1
CORRECTIONS = ANY_RUN + 1
ANY_RUN_OBSERVATIONS = 300.0
ODDS_STEPS = 33
ODDS_END = 8.0
CORRECTION_RATE = 0.02
CORRECTED_LIMIT = 1e6
CORRECTION_PRIOR = 5.0  # observations that the start of the last stage counts for


class Mixer(NamedTuple):
    """What the predictor has learnt.

    Attributes:
        rates: float32 `(RATES,)`.
        stretched: float32 `(RATES,)`, `stretch` of each rate, which saves a logarithm for each context of a candidate.
        observed: int32 `(RATES,)`, observations behind each rate, up to `RATE_LIMIT`.
        weights: float32 `(LENGTH_BUCKETS, INPUTS + 1)`, the set chosen by the longest match; the last is the bias.
        token_weights: float32 `(BY_TOKEN, WEIGHT_TOKENS, INPUTS)`, added to these.
        correction: float32 `(CORRECTIONS, ODDS_STEPS)`, the last one of `ANY_RUN`.
        corrected: float32, likewise: observations behind each, fractions of them where they lie between two steps.
        maps: float32 `(BY_TOKEN, MAP_TOKENS, MAP_STEPS)`.
        mapped: float32, likewise: observations behind each.
    """

    rates: Float32
    stretched: Float32
    observed: Int32
    weights: Float32
    token_weights: Float32
    correction: Float32
    corrected: Float32
    maps: Float32
    mapped: Float32


class Candidates(NamedTuple):
    """Room for the candidates of one position.

    Attributes:
        tokens: int64 `(MAX_CANDIDATES,)`.
        times: int64 `(MAX_CANDIDATES, MAX_CONTEXTS)`, how often each followed each context; its share bucket
            for a kind that is not `COUNTED`.
        odds: float64 `(MAX_CANDIDATES,)`, log-odds before the maps.
        mixed: float64 `(MAX_CANDIDATES,)`, probability before the last stage.
        stretched: float64 `(MAX_CANDIDATES, MAX_CONTEXTS)`, the inputs.
        rate: int64, likewise: which rate each input is.
        place: int64 `(MAX_CONTEXTS,)`, which weight each context has.
        first_rate: int64 `(MAX_CONTEXTS,)`, the first of the rates of each context, in pairs.
    """

    tokens: Int64
    times: Int64
    odds: Float64
    mixed: Float64
    stretched: Float64
    rate: Int64
    place: Int64
    first_rate: Int64


def start() -> Mixer:
    """A predictor that has learnt nothing: rates by the escape estimate, weights by rule, maps that keep the odds."""
    seens = np.array([1, 2, 3, 4.5, 7, 12, 32, 128])
    lengths = np.array([1, 2, 3, 4, 5, 6, 7.5, 10.5, 14.5, 20, 32, 60])
    seen, length = seens[None, None, :, None, None], lengths[None, :, None, None, None]
    share = np.arange(SHARE_BUCKETS)[None, None, None, :, None]
    times = np.where(
        seen <= 3, np.minimum(share, seen), np.where(share == SHARE_BUCKETS - 1, seen, (share - 0.5) / 8 * seen)
    )
    times = np.where(share == 0, 0.0, times)
    latest = np.array([0.02, 0.15])[None, None, None, None, :]
    rates = (times + latest) / (seen + ESCAPE / length + 0.2)
    rates = np.broadcast_to(rates, (KINDS, LENGTH_BUCKETS, SEEN_BUCKETS, SHARE_BUCKETS, 2)).copy()
    rates[RANKED] = RANKED_RATES[None, None, :, None]
    rates[PROPOSED] = PROPOSED_RATES[None, None, :, None]
    rates[INDIRECT] = INDIRECT_RATES[None, None, :, None]
    rates = np.clip(rates.ravel(), 0.002, 0.995).astype(np.float32)
    weights = np.empty((LENGTH_BUCKETS, INPUTS + 1), np.float32)
    by_kind = weights[:, :INPUTS].reshape(LENGTH_BUCKETS, KINDS, LENGTH_BUCKETS)  # a view
    by_kind[:] = SHORTER_WEIGHT[:, None, None]
    longest = np.arange(LENGTH_BUCKETS)
    by_kind[longest, :, longest] = LONGEST_WEIGHT[:, None]
    by_kind[:, [RANKED, PROPOSED]] = BY_PRODUCT_WEIGHT
    weights[:, BIAS] = 0.0
    odds = np.linspace(-ODDS_END, ODDS_END, ODDS_STEPS)
    steps = np.linspace(-ODDS_END, ODDS_END, MAP_STEPS)
    correction = np.tile(1 / (1 + np.exp(-odds)), (CORRECTIONS, 1))
    return Mixer(
        rates,
        stretched_rates(rates),
        np.zeros(RATES, np.int32),
        weights,
        np.zeros((BY_TOKEN, WEIGHT_TOKENS, INPUTS), np.float32),
        correction.astype(np.float32),
        np.zeros((CORRECTIONS, ODDS_STEPS), np.float32),
        np.tile((1 / (1 + np.exp(-steps))).astype(np.float32), (BY_TOKEN, MAP_TOKENS, 1)),
        np.zeros((BY_TOKEN, MAP_TOKENS, MAP_STEPS), np.float32),
    )


def stretched_rates(rates: Float32) -> Float32:
    """`Mixer.stretched` for these rates."""
    exact = rates.astype(np.float64)
    return np.log(exact / (1.0 - exact)).astype(np.float32)


@kernel
def room() -> Candidates:
    """Room for the candidates of one position."""
    return Candidates(
        np.empty(MAX_CANDIDATES, np.int64),
        np.empty((MAX_CANDIDATES, MAX_CONTEXTS), np.int64),
        np.empty(MAX_CANDIDATES, np.float64),
        np.empty(MAX_CANDIDATES, np.float64),
        np.empty((MAX_CANDIDATES, MAX_CONTEXTS), np.float64),
        np.empty((MAX_CANDIDATES, MAX_CONTEXTS), np.int64),
        np.empty(MAX_CONTEXTS, np.int64),
        np.empty(MAX_CONTEXTS, np.int64),
    )


@kernel
def bucket(ends: Int64, value: int) -> int:
    """The first bucket whose upper end is not below `value`."""
    place = 0
    while place < len(ends) and value > ends[place]:
        place += 1
    return place


@kernel
def share_bucket(times: int, seen: int) -> int:
    """0 = never, 9 = always; in between the count itself where it is small, else the share in eighths."""
    if times == 0:
        return 0
    if seen <= 3:
        return min(times, seen)
    if times >= seen:
        return SHARE_BUCKETS - 1
    return 1 + 8 * times // (seen + 1)


@kernel
def stretch(probability: float) -> float:
    """Log-odds."""
    return math.log(probability / (1.0 - probability))


@kernel
def squash(odds: float) -> float:
    """The inverse of `stretch`, for odds of any size."""
    return 1.0 / (1.0 + math.exp(-min(max(odds, -20.0), 20.0)))


@kernel
def find_candidates(evidence: Int64, rows: int, candidates: Candidates) -> int:
    """Fill `candidates.tokens` with the likeliest token of each context; return how many there are."""
    found = 0
    for i in range(rows):
        token = evidence[i, LIKELIEST]
        known = token == SEPARATOR
        for j in range(found):
            known = known or candidates.tokens[j] == token
        if not known and found < LIKELIEST_CANDIDATES:
            candidates.tokens[found] = token
            found += 1
    return found


@kernel
def predict(evidence: Int64, rows: int, mixer: Mixer, candidates: Candidates, found: int, last: int) -> None:
    """Mix the evidence for each of the first `found` candidates, whose `times` are known, behind the token `last`."""
    weights = mixer.weights[bucket(LENGTHS, longest_match(evidence, rows))]
    behind = mixer.token_weights[0, last & (WEIGHT_TOKENS - 1)]
    for i in range(rows):
        place = evidence[i, KIND] * LENGTH_BUCKETS + bucket(LENGTHS, evidence[i, MATCHED])
        candidates.place[i] = place
        candidates.first_rate[i] = (place * SEEN_BUCKETS + bucket(SEENS, evidence[i, SEEN])) * SHARE_BUCKETS
    for j in range(found):
        token = candidates.tokens[j]
        candidate = mixer.token_weights[1, token & (WEIGHT_TOKENS - 1)]
        odds = BIAS_INPUT * weights[BIAS]
        for i in range(rows):
            seen = evidence[i, SEEN]
            share = candidates.times[j, i]
            if evidence[i, KIND] < COUNTED:
                share = share_bucket(min(seen, share), seen)
            place = candidates.place[i]
            rate = 2 * (candidates.first_rate[i] + share) + (1 if evidence[i, LATEST] == token else 0)
            candidates.rate[j, i] = rate
            candidates.stretched[j, i] = mixer.stretched[rate]
            odds += (weights[place] + behind[place] + candidate[place]) * candidates.stretched[j, i]
        candidates.odds[j] = odds
        mapped = map_odds(mixer, 0, last, odds) + map_odds(mixer, 1, token, odds)
        candidates.mixed[j] = squash((odds + mapped) / (1.0 + BY_TOKEN))


@kernel
def likeliest(candidates: Candidates, found: int) -> int:
    """Which of the first `found` candidates is likeliest; of equals, the first."""
    best = 0
    for j in range(1, found):
        if candidates.mixed[j] > candidates.mixed[best]:
            best = j
    return best


@kernel
def map_place(odds: float) -> float:
    """Where log-odds lie on the grid of `Mixer.maps`, in steps."""
    step = 2.0 * ODDS_END / (MAP_STEPS - 1)
    return min(max((odds + ODDS_END) / step, 0.0), MAP_STEPS - 1.001)


@kernel
def between_steps(line: Float32, place: float) -> float:
    """The value of a line at a place between two of its steps, or at one."""
    low = int(place)
    return line[low] + (place - low) * (line[low + 1] - line[low])


@kernel
def map_odds(mixer: Mixer, which: int, token: int, odds: float) -> float:
    """The log-odds that `odds` have been worth with this token, by one of the maps."""
    line = mixer.maps[which, token & (MAP_TOKENS - 1)]
    probability = between_steps(line, map_place(odds))
    return stretch(min(max(probability, LOWEST), 1.0 - LOWEST))


@kernel
def learn_map(mixer: Mixer, which: int, token: int, odds: float, right: float) -> None:
    """Move one of the maps towards whether what had `odds` was right, 1 or 0."""
    entry = token & (MAP_TOKENS - 1)
    place = map_place(odds)
    low = int(place)
    for step in range(low, low + 2):
        share = 1.0 - abs(place - step)
        mixer.mapped[which, entry, step] = min(mixer.mapped[which, entry, step] + share, CORRECTED_LIMIT)
        rate = max(MAP_RATE, 1.0 / (mixer.mapped[which, entry, step] + MAP_PRIOR))
        mixer.maps[which, entry, step] += rate * share * (right - mixer.maps[which, entry, step])


@kernel
def longest_match(evidence: Int64, rows: int) -> int:
    """Tokens of the longest context in any text; rankings and proposals are none."""
    longest = 0
    for i in range(rows):
        if evidence[i, KIND] < COUNTED:
            longest = max(longest, evidence[i, MATCHED])
    return longest


@kernel
def learn(
    evidence: Int64, rows: int, mixer: Mixer, candidates: Candidates, found: int, last: int, committed: int
) -> None:
    """Move rates, weights and maps towards what was committed, after `predict` for that position."""
    weights = mixer.weights[bucket(LENGTHS, longest_match(evidence, rows))]
    behind = mixer.token_weights[0, last & (WEIGHT_TOKENS - 1)]
    for j in range(found):
        candidate = mixer.token_weights[1, candidates.tokens[j] & (WEIGHT_TOKENS - 1)]
        right = 1.0 if candidates.tokens[j] == committed else 0.0
        error = right - squash(candidates.odds[j])
        learn_map(mixer, 0, last, candidates.odds[j], right)
        learn_map(mixer, 1, candidates.tokens[j], candidates.odds[j], right)
        weights[BIAS] += LEARNING_RATE * error * BIAS_INPUT
        for i in range(rows):
            place = candidates.place[i]
            change = error * candidates.stretched[j, i]
            weights[place] += LEARNING_RATE * change
            behind[place] += TOKEN_LEARNING_RATE * change
            candidate[place] += TOKEN_LEARNING_RATE * change
            rate = candidates.rate[j, i]
            mixer.observed[rate] = min(mixer.observed[rate] + 1, RATE_LIMIT)
            moved = mixer.rates[rate] + (right - mixer.rates[rate]) / (mixer.observed[rate] + RATE_PRIOR)
            mixer.rates[rate] = min(max(moved, LOWEST), 1.0 - LOWEST)
            mixer.stretched[rate] = stretch(mixer.rates[rate])


@kernel
def odds_place(mixed: float) -> float:
    """Where a mixed probability lies on the grid of `Mixer.correction`, in steps."""
    step = 2.0 * ODDS_END / (ODDS_STEPS - 1)
    bounded = min(max(mixed, 1e-4), 1.0 - 1e-4)
    return min(max((stretch(bounded) + ODDS_END) / step, 0.0), ODDS_STEPS - 1.001)


@kernel
def correct(mixer: Mixer, run: int, mixed: float) -> float:
    """The probability that `mixed` has been worth behind so many tokens that were foreseen, and behind any number."""
    row = bucket(RUNS, run)
    place = odds_place(mixed)
    seen = between_steps(mixer.corrected[row], place)
    after_it, after_any = between_steps(mixer.correction[row], place), between_steps(mixer.correction[ANY_RUN], place)
    return (seen * after_it + ANY_RUN_OBSERVATIONS * after_any) / (seen + ANY_RUN_OBSERVATIONS)


@kernel
def learn_correction(mixer: Mixer, run: int, mixed: float, right: bool) -> None:
    """Move the correction towards whether the token behind so many that were foreseen was right."""
    place = odds_place(mixed)
    low = int(place)
    truth = 1.0 if right else 0.0
    for row in (bucket(RUNS, run), ANY_RUN):
        for step in range(low, low + 2):
            share = 1.0 - abs(place - step)
            # At first the mean of what was seen, later a running one.
            mixer.corrected[row, step] = min(mixer.corrected[row, step] + share, CORRECTED_LIMIT)
            rate = max(CORRECTION_RATE, 1.0 / (mixer.corrected[row, step] + CORRECTION_PRIOR))
            mixer.correction[row, step] += rate * share * (truth - mixer.correction[row, step])
