"""Slow and plain references for everything that has a kernel. Imports nothing of freedraft."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple


@dataclass(frozen=True)
class Context:
    """One suffix of a text that occurred before, the longest of those with the same earlier occurrences."""

    length: int
    ends: tuple[int, ...]
    """Positions of the last token of each earlier occurrence, ascending; -1 stands for the empty one at the start."""
    text: tuple[int, ...]

    @property
    def count(self) -> int:
        return len(self.ends)

    @property
    def continuations(self) -> dict[int, int]:
        """Next token -> how often it followed."""
        found: dict[int, int] = {}
        for end in self.ends:
            token = self.text[end + 1]
            found[token] = found.get(token, 0) + 1
        return found

    @property
    def likeliest(self) -> int:
        """The most frequent continuation; of equals, the one that followed last."""
        latest = {self.text[end + 1]: end for end in self.ends}
        counts = self.continuations
        return max(counts, key=lambda token: (counts[token], latest[token]))

    @property
    def recent(self) -> int:
        return self.text[self.ends[-1] + 1]


def contexts(text: Sequence[int]) -> list[Context]:
    """All contexts of a text, longest first; the last one is the empty context (none for an empty text)."""
    whole = tuple(text)
    n = len(whole)
    found = []
    ends = list(range(-1, n - 1))
    length = 0
    while ends:
        longer = [e for e in ends if e - length >= 0 and whole[e - length] == whole[n - 1 - length]]
        if len(longer) < len(ends):
            found.append(Context(length, tuple(ends), whole))
        ends = longer
        length += 1
    return found[::-1]


def longest_match(text: Sequence[int]) -> int:
    """The length of the longest suffix that occurred before."""
    found = contexts(text)
    return found[0].length if found else 0


def match_in(learnt: Sequence[int], text: Sequence[int]) -> int:
    """The length of the longest suffix of `text` that occurs in `learnt` with a token after it."""
    ends = list(range(len(learnt) - 1))
    for length in range(len(text)):
        ends = [end for end in ends if end >= length and learnt[end - length] == text[len(text) - 1 - length]]
        if not ends:
            return length
    return len(text)


def prompt_lookup(text: Sequence[int], low: int, high: int, budget: int, *, earliest: bool) -> list[int]:
    """Copy what followed the last or first occurrence of the longest n-gram, n in low..high, that ends the text.

    A copy that reaches the end of the text goes on into what it has itself copied.
    """
    n = len(text)
    for length in range(min(high, n - 1), low - 1, -1):
        suffix = list(text[n - length :])
        starts = [i for i in range(n - length) if list(text[i : i + length]) == suffix]
        if starts:
            at = (starts[0] if earliest else starts[-1]) + length
            grown = list(text)
            for i in range(budget):
                grown.append(grown[at + i])
            return grown[n:]
    return []


def fibonacci_word(length: int) -> list[int]:
    """The infinite Fibonacci word over 0 and 1, cut off."""
    previous, current = [0], [0, 1]
    while len(current) < length:
        previous, current = current, current + previous
    return current[:length]


def de_bruijn(symbols: int, order: int) -> list[int]:
    """A de Bruijn word: every string of `order` symbols occurs once, cyclically (from Lyndon words)."""
    word = [0] * (symbols * order)
    result: list[int] = []

    def extend(t: int, p: int) -> None:
        if t > order:
            if order % p == 0:
                result.extend(word[1 : p + 1])
            return
        word[t] = word[t - p]
        extend(t + 1, p)
        for symbol in range(word[t - p] + 1, symbols):
            word[t] = symbol
            extend(t + 1, t)

    extend(1, 1)
    return result


def suffix_draft(
    text: Sequence[int],
    budget: int,
    *,
    contexts_tried: int,
    escape: float,
    min_match: int = 1,
    min_probability: float = 0.0,
    tokens_per_match: float | None = None,
    min_expected: float = 0.0,
) -> tuple[list[int], list[float]]:
    """The likeliest continuation of the best of the longest contexts, with its cumulative probabilities."""
    whole = tuple(text)
    n = len(whole)

    def all_ends(string: tuple[int, ...]) -> list[int]:
        return [e for e in range(len(string) - 1, n) if whole[e - len(string) + 1 : e + 1] == string]

    def estimate(context: Context, matched: int) -> float:
        return context.continuations[context.likeliest] / (context.count + escape / matched)

    tried = [c for c in contexts(whole)[:contexts_tried] if c.length >= min_match]
    if not tried:
        return [], []
    best = max(tried, key=lambda c: estimate(c, c.length))
    string = whole[n - best.length :]
    most = budget if tokens_per_match is None else min(budget, int(tokens_per_match * best.length))
    tokens: list[int] = []
    probabilities: list[float] = []
    likelihood = 1.0
    while len(tokens) < most and string:
        context = Context(len(string), tuple(e for e in all_ends(string) if e < n - 1), whole)
        likelihood *= min(1.0, estimate(context, len(string)))
        if likelihood < min_probability:
            break
        tokens.append(context.likeliest)
        probabilities.append(likelihood)
        string = (*string, context.likeliest)
        while string and not [e for e in all_ends(string) if e < n - 1]:
            # What only ends the text has no continuation: on to the longest suffix that occurs more often.
            ends = len(all_ends(string))
            while string and len(all_ends(string)) == ends:
                string = string[1:]
    if sum(probabilities) < min_expected:
        return [], []
    return tokens, probabilities


def index_continuations(
    documents: Sequence[Sequence[int]], context: Sequence[int], min_count: int = 1
) -> dict[int, int]:
    """Next token -> how often it follows `context` within a document, those seen at least `min_count` times."""
    found: dict[int, int] = {}
    m = len(context)
    wanted = list(context)
    for document in documents:
        for start in range(len(document) - m):
            if list(document[start : start + m]) == wanted:
                token = document[start + m]
                found[token] = found.get(token, 0) + 1
    return {token: count for token, count in found.items() if count >= min_count}


def index_match(documents: Sequence[Sequence[int]], text: Sequence[int], min_count: int = 1) -> int:
    """The length of the longest suffix of `text` that a continuation is kept for."""
    for length in range(len(text)):
        if not index_continuations(documents, text[len(text) - 1 - length :], min_count):
            return length
    return len(text)


def index_count(documents: Sequence[Sequence[int]], context: Sequence[int]) -> int:
    """How often `context` is followed by a token of its document."""
    return sum(index_continuations(documents, context).values())


def index_likeliest(documents: Sequence[Sequence[int]], context: Sequence[int], min_count: int = 1) -> tuple[int, int]:
    """The most frequent kept continuation, of equals the smallest token, and its count."""
    found = index_continuations(documents, context, min_count)
    token = min(found, key=lambda token: (-found[token], token))
    return token, found[token]


MIX_RUNS = (0, 2, 7)
MIX_LENGTHS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 40)
MIX_SEENS = (1, 2, 3, 5, 8, 16, 64)
MIX_LENGTH_MEANS = (1, 2, 3, 4, 5, 6, 7.5, 10.5, 14.5, 20, 32, 60)
MIX_SEEN_MEANS = (1, 2, 3, 4.5, 7, 12, 32, 128)
RANKED_RATES = (0.01, 0.01, 0.012, 0.015, 0.02, 0.025, 0.04, 0.06, 0.12, 0.4)
OWN_TEXT, REPLIES, CORPUS, REFERENCE, OWN_FAR, RANKED, PROPOSED, INDIRECT = range(8)
PROPOSED_SHARES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9)
PROPOSED_RATES = (0.01, 0.01, 0.035, 0.075, 0.15, 0.27, 0.42, 0.6, 0.8, 0.95)
INDIRECT_RATES = (*[0.02] * 9, 0.1)


def float32(value: float) -> float:
    """A number as 32 bits keep it."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


@dataclass(frozen=True)
class Evidence:
    """A context of a position in one text: how often it occurred, and what followed."""

    kind: int
    length: int
    followed: tuple[int, ...]
    """The tokens that followed, in order of place."""
    ends_text: frozenset[int]
    """Tokens for which context and token end the text."""
    recent: int = -1
    """Where its last occurrence that something followed ends in the text."""

    @property
    def likeliest(self) -> int:
        latest = {token: i for i, token in enumerate(self.followed)}
        return max(latest, key=lambda token: (self.followed.count(token), latest[token]))

    @property
    def latest(self) -> int:
        return self.followed[-1]

    @property
    def seen(self) -> int:
        return len(self.followed)

    def share(self, token: int) -> int:
        """The bucket of how often the token followed."""
        times = self.times(token)
        if times == 0 or self.seen <= 3:
            return times
        return 9 if times >= self.seen else 1 + 8 * times // (self.seen + 1)

    def times(self, token: int) -> int:
        """How often the token followed; where it is not the likeliest, the text's last token does not count yet."""
        times = self.followed.count(token)
        if times and token != self.likeliest and token in self.ends_text:
            return max(1, times - 1)
        return times


class CorpusEvidence(Evidence):
    """A context in a corpus' documents: every continuation counts, and none is the latest."""

    @property
    def likeliest(self) -> int:
        return min(self.followed, key=lambda token: (-self.followed.count(token), token))

    @property
    def latest(self) -> int:
        return -1

    def times(self, token: int) -> int:
        return self.followed.count(token)


class Proposal(Evidence):
    """A token that another drafter, the one of number `recent`, proposes behind `length - 1` others."""

    @property
    def latest(self) -> int:
        return -1

    @property
    def seen(self) -> int:
        return MIX_SEENS[self.recent]

    def share(self, token: int) -> int:
        (bucket,) = self.ends_text
        return bucket if token == self.likeliest else 0


class Successor(Proposal):
    """What came after the last follower of a context before; `recent` is how often, less how often another did."""

    @property
    def seen(self) -> int:
        return self.recent


def proposed(
    drafter: int, nodes: Sequence[tuple[int, int, float]], path: Sequence[int], most: int = 3
) -> list[Evidence]:
    """What a draft, (token, parent, cumulative probability) a node, has next where it has `path`."""
    place = -1
    for token in path:
        following = [i for i, node in enumerate(nodes) if node[:2] == (token, place)]
        if not following:
            return []
        place = following[0]
    found: list[Evidence] = []
    for token, parent, likelihood in nodes:
        if parent == place and len(found) < most:
            alone = float32(likelihood / (nodes[parent][2] if parent >= 0 else 1.0))
            bucket = 1 + sum(alone > end for end in PROPOSED_SHARES[1:])
            found.append(Proposal(PROPOSED, 1 + len(path), (token,), frozenset([bucket]), drafter))
    return found


def evidence_in_corpus(
    kind: int, documents: Sequence[Sequence[int]], before: Sequence[int], most: int
) -> list[Evidence]:
    """The `most` longest contexts in a segment's documents of a position that comes after `before`."""
    found: list[Evidence] = []
    seen = 0
    for length in range(index_match(documents, before), 0, -1):
        string = before[len(before) - length :]
        followed = tuple(token for token, times in index_continuations(documents, string).items() for _ in range(times))
        if followed and len(followed) != seen and len(found) < most:
            found.append(CorpusEvidence(kind, length, followed, frozenset()))
        seen = len(followed) or seen
    return found


def evidence_in(kind: int, text: Sequence[int], before: Sequence[int], most: int) -> list[Evidence]:
    """The `most` longest contexts in `text` of a position that comes after `before`."""
    found: list[Evidence] = []
    known: set[tuple[int, ...]] = set()
    for length in range(match_in(text, before), 0, -1):
        string = list(before[len(before) - length :])
        ends = tuple(i + length for i in range(len(text) - length + 1) if list(text[i : i + length]) == string)
        followed = tuple(text[end] for end in ends if end < len(text))
        if ends not in known and followed and len(found) < most:
            last = frozenset(text[-1:]) if ends and len(text) - 1 in ends else frozenset()
            recent = max(end for end in ends if end < len(text)) - 1
            found.append(Evidence(kind, length, followed, last, recent))
        known.add(ends)
    return found


class Candidate(NamedTuple):
    """A candidate: probability before the last stage, log-odds before the maps, (rate's key, log-odds) a context."""

    token: int
    mixed: float
    odds: float
    inputs: list[tuple[tuple[int, ...], float]]


def _squash(odds: float) -> float:
    return 1 / (1 + math.exp(-min(max(odds, -20.0), 20.0)))


class Mixing:
    """The predictor of fusion: tables as dictionaries and lists, rounded to 32 bits where it keeps them so."""

    def __init__(self, *, separator: int, escape: float, contexts: int = 3, candidates: int = 6, reach: int = 64):
        self.separator, self.contexts, self.candidates, self.reach = separator, contexts, candidates, reach
        self.escape = escape
        self.rates: dict[tuple[int, ...], float] = {}
        self.observed: dict[tuple[int, ...], int] = {}
        self.weights: dict[tuple[int, ...], float] = {}
        self.token_weights: dict[tuple[int, ...], float] = {}
        grid = [-8 + 0.5 * i for i in range(33)]
        self.correction = [[float32(1 / (1 + math.exp(-odds))) for odds in grid] for _ in range(5)]
        self.corrected = [[0.0] * len(grid) for _ in range(5)]
        self.maps: dict[tuple[int, int], list[float]] = {}
        self.mapped: dict[tuple[int, int], list[float]] = {}
        self.successors: dict[int, tuple[int, int, int, int]] = {}

    def rate(self, key: tuple[int, ...]) -> float:
        """The rate of (kind, length bucket, seen bucket, share, latest), at first by the escape estimate."""
        if key not in self.rates:
            kind, length, seen_bucket, share, latest = key
            seen = MIX_SEEN_MEANS[seen_bucket]
            if share == 0:
                times = 0.0
            elif seen <= 3:
                times = min(share, seen)
            else:
                times = seen if share == 9 else (share - 0.5) / 8 * seen
            if kind in (RANKED, PROPOSED, INDIRECT):
                told = {RANKED: RANKED_RATES, PROPOSED: PROPOSED_RATES, INDIRECT: INDIRECT_RATES}
                self.rates[key] = float32(told[kind][share])
                return self.rates[key]
            estimate = (times + (0.15 if latest else 0.02)) / (seen + self.escape / MIX_LENGTH_MEANS[length] + 0.2)
            self.rates[key] = float32(min(max(estimate, 0.002), 0.995))
        return self.rates[key]

    def predict(self, evidence: list[Evidence], last: int) -> list[Candidate]:
        """The candidates of the token behind `last`."""
        tokens: list[int] = []
        for context in evidence:
            if context.likeliest not in (*tokens, self.separator) and len(tokens) < self.candidates:
                tokens.append(context.likeliest)
        chosen = self._set(evidence)
        result: list[Candidate] = []
        for token in tokens:
            odds = 0.3 * self.weights.get((chosen, -1), 0.0)
            inputs = []
            for context in evidence:
                seen, share = context.seen, context.share(token)
                length = _bucket(MIX_LENGTHS, context.length)
                latest = int(context.latest == token)
                key = (context.kind, length, _bucket(MIX_SEENS, seen), share, latest)
                rate = self.rate(key)
                inputs.append((key, float32(math.log(rate / (1 - rate)))))
                weight = self._weight(chosen, key)
                for added in self._of_tokens(last, token, key):
                    weight = float32(weight + self.token_weights.get(added, 0.0))
                odds += weight * inputs[-1][1]
            mean = (odds + self.map_odds(0, last, odds) + self.map_odds(1, token, odds)) / 3
            result.append(Candidate(token, _squash(mean), odds, inputs))
        return result

    def map_odds(self, which: int, token: int, odds: float) -> float:
        line, low, share = self._map_place(which, token, odds)
        probability = line[low] + share * float32(line[low + 1] - line[low])
        bounded = min(max(probability, 1 / 2048), 1 - 1 / 2048)
        return math.log(bounded / (1 - bounded))

    def learn_map(self, which: int, token: int, odds: float, right: float) -> None:
        line, low, share = self._map_place(which, token, odds)
        seen = self.mapped.setdefault((which, token % 4096), [0.0] * 17)
        for step, part in ((low, 1 - share), (low + 1, share)):
            seen[step] = float32(min(seen[step] + part, 1e6))
            rate = max(0.02, 1 / (seen[step] + 2))
            line[step] = float32(line[step] + rate * part * (right - line[step]))

    def _map_place(self, which: int, token: int, odds: float) -> tuple[list[float], int, float]:
        start = [float32(1 / (1 + math.exp(-step))) for step in range(-8, 9)]
        place = min(max(odds + 8, 0.0), 17 - 1.001)
        return self.maps.setdefault((which, token % 4096), start), int(place), place - int(place)

    def learn(self, evidence: list[Evidence], last: int, committed: int) -> None:
        chosen = self._set(evidence)
        for token, _, odds, inputs in self.predict(evidence, last):
            right = 1.0 if token == committed else 0.0
            error = right - _squash(odds)
            self.learn_map(0, last, odds, right)
            self.learn_map(1, token, odds, right)
            self.weights[chosen, -1] = float32(self.weights.get((chosen, -1), 0.0) + 0.01 * error * 0.3)
            for key, stretched in inputs:
                weight = self._weight(chosen, key) + 0.01 * error * stretched
                self.weights[(chosen, *key[:2])] = float32(weight)
                for added in self._of_tokens(last, token, key):
                    self.token_weights[added] = float32(self.token_weights.get(added, 0.0) + 0.04 * error * stretched)
                self.observed[key] = min(self.observed.get(key, 0) + 1, 255)
                rate = self.rates[key]
                moved = rate + (right - rate) / (self.observed[key] + 8)
                self.rates[key] = float32(min(max(moved, 1 / 2048), 1 - 1 / 2048))

    def succeeding(self, evidence: Sequence[Evidence], owner: int) -> list[Evidence]:
        """What followed before on the last follower of the longest own context; `evidence` starts with these."""
        if not evidence or evidence[0].kind not in (OWN_TEXT, OWN_FAR):
            return []
        before = evidence[0].latest
        whose, follower, successor, trust = self.successors.get((before + 40503 * owner) % 4096, (0, 0, 0, 0))
        if not trust or (whose, follower) != (owner, before):
            return []
        length = 1 + min(evidence[0].length, 40) // 4
        return [Successor(INDIRECT, length, (successor,), frozenset([9]), trust)]

    def learn_successor(self, evidence: Sequence[Evidence], owner: int, token: int) -> None:
        if not evidence or evidence[0].kind not in (OWN_TEXT, OWN_FAR) or evidence[0].latest == token:
            return
        before = evidence[0].latest
        entry = (before + 40503 * owner) % 4096
        *known, trust = self.successors.get(entry, (0, 0, 0, 0))
        if trust and known == [owner, before, token]:
            self.successors[entry] = (owner, before, token, min(trust + 1, 60))
        elif trust > 1 and known[0] == owner:
            self.successors[entry] = (*known, trust - 1)
        else:
            self.successors[entry] = (owner, before, token, 1)

    def correct(self, run: int, mixed: float) -> float:
        low, share = self._place(mixed)

        def between(line: list[float]) -> float:
            return line[low] + share * float32(line[low + 1] - line[low])

        row = _bucket(MIX_RUNS, run)
        seen = between(self.corrected[row])
        # The last row, of any run, counts for 300 observations.
        return (seen * between(self.correction[row]) + 300 * between(self.correction[-1])) / (seen + 300)

    def learn_correction(self, run: int, mixed: float, right: bool) -> None:
        low, share = self._place(mixed)
        for row in (_bucket(MIX_RUNS, run), -1):
            line, seen = self.correction[row], self.corrected[row]
            for step, part in ((low, 1 - share), (low + 1, share)):
                seen[step] = float32(min(seen[step] + part, 1e6))
                rate = max(0.02, 1 / (seen[step] + 5))
                line[step] = float32(line[step] + rate * part * (right - line[step]))

    def _set(self, evidence: list[Evidence]) -> int:
        texts = [context.length for context in evidence if context.kind not in (RANKED, PROPOSED, INDIRECT)]
        return _bucket(MIX_LENGTHS, max(texts, default=0))

    def _weight(self, chosen: int, key: tuple[int, ...]) -> float:
        kind, length = key[:2]
        if kind in (RANKED, PROPOSED):
            first = 0.3
        elif length == chosen:
            first = 0.6 + 0.2 * chosen / 11
        else:
            first = 0.2 - 0.1 * chosen / 11
        return self.weights.get((chosen, kind, length), float32(first))

    def _of_tokens(self, last: int, token: int, key: tuple[int, ...]) -> list[tuple[int, ...]]:
        """What is added to the weight of a context, by the last token and by the candidate."""
        return [(0, last % 1024, *key[:2]), (1, token % 1024, *key[:2])]

    def _place(self, mixed: float) -> tuple[int, float]:
        bounded = min(max(mixed, 1e-4), 1 - 1e-4)
        place = min(max((math.log(bounded / (1 - bounded)) + 8) / 0.5, 0.0), 33 - 1.001)
        return int(place), place - int(place)


def _bucket(ends: Sequence[int], value: int) -> int:
    return sum(value > end for end in ends)


def _kind(evidence: Sequence[Evidence], token: int) -> int:
    """The kind of text whose longest context suggests a token first."""
    return next((context.kind for context in evidence if context.likeliest == token), OWN_TEXT)


class Fusing:
    """One sequence of fusion; `replies` are the texts of earlier ones, the youngest generation first.

    `reference` is a text expected behind the prompt; each of the `corpora` is the documents of a segment.
    """

    def __init__(
        self,
        mixing: Mixing,
        prompt: Sequence[int],
        replies: Sequence[Sequence[int]] = (),
        reference: Sequence[int] = (),
        corpora: Sequence[Sequence[Sequence[int]]] = (),
        owner: int = 0,
    ) -> None:
        self.owner = owner
        self.mixing, self.text, self.replies, self.corpora = mixing, list(prompt), replies, corpora
        self.reference = [*prompt[-mixing.reach :], *reference] if reference else []
        self.started: int | None = None
        self.considered: list[tuple[int, float]] = []
        self.proposals: list[list[tuple[int, int, float]]] = []
        """What other drafters draft behind the committed text; to be set before each draft."""
        self.since: list[int] = []
        """What was committed behind them."""
        self.bias: dict[int, float] = {}
        self.run = self.drafted_run = 0
        self.tied = False
        """Two candidates were so nearly equal that the order of a sum decides which is likelier."""

    def _likeliest(self, candidates: list[Candidate]) -> Candidate:
        best = max(candidates, key=lambda candidate: candidate.mixed)
        self.tied |= any(abs(one.mixed - best.mixed) < 1e-9 for one in candidates if one.token != best.token)
        return best

    def evidence(self, drafted: Sequence[int] = ()) -> list[Evidence]:
        before = [*self.text, *drafted]
        most = self.mixing.contexts
        found = [
            replace(one, kind=OWN_FAR) if len(self.text) - one.recent > 256 else one
            for one in evidence_in(OWN_TEXT, self.text, before, most)
        ]
        for reply in self.replies:
            found += evidence_in(REPLIES, reply, before[-self.mixing.reach :], most)
        found += evidence_in(REFERENCE, self.reference, before[-self.mixing.reach :], most)
        found += self.mixing.succeeding(found, self.owner)
        for documents in self.corpora:
            found += evidence_in_corpus(CORPUS, documents, before, most)
        for i, nodes in enumerate(self.proposals):
            found += proposed(i, nodes, [*self.since, *drafted])
        return found

    def extend(self, tokens: Sequence[int]) -> None:
        judging = True
        for depth, token in enumerate(tokens):
            if self.started is not None:
                if judging and depth < len(self.considered):
                    drafted, mixed = self.considered[depth]
                    judging = drafted == token
                    self.mixing.learn_correction(self.drafted_run + depth, mixed, judging)
                self._foresee(token)
                evidence = self.evidence()
                self.mixing.learn(evidence, self.text[-1] if self.text else -1, token)
                self.mixing.learn_successor(evidence, self.owner, token)
            self.text.append(token)
            self.since.append(token)
        self.considered, self.proposals, self.since = [], [], []

    def _foresee(self, token: int) -> None:
        evidence = self.evidence()
        candidates = self.mixing.predict(evidence, [-1, *self.text][-1])
        if not candidates:
            self.run = 0
        else:
            best = self._likeliest(candidates)
            kind = _kind(evidence, best.token)
            right = best.token == token
            self.bias[kind] = self.bias.get(kind, 0.0) + 0.05 * (right - self._trusted(kind, best.mixed))
            self.run = self.run + 1 if right else 0

    def _trusted(self, kind: int, mixed: float) -> float:
        bounded = min(max(mixed, 1e-4), 1 - 1e-4)
        return _squash(math.log(bounded / (1 - bounded)) + self.bias.get(kind, 0.0))

    def draft(self, budget: int, min_probability: float) -> tuple[list[int], list[float]]:
        if self.started is None:
            self.started = len(self.text)
        tokens: list[int] = []
        probabilities: list[float] = []
        self.considered = []
        self.drafted_run = self.run
        likelihood = 1.0
        while len(tokens) < budget:
            evidence = self.evidence(tokens)
            candidates = self.mixing.predict(evidence, [-1, *self.text, *tokens][-1])
            if not candidates:
                break
            token, mixed, *_ = self._likeliest(candidates)
            mixed = self._trusted(_kind(evidence, token), mixed)
            self.considered.append((token, float32(mixed)))
            likelihood *= self.mixing.correct(self.run + len(tokens), mixed)
            if likelihood < min_probability:
                break
            tokens.append(token)
            probabilities.append(likelihood)
        return tokens, probabilities

    @property
    def reply(self) -> list[int]:
        """What was committed since the first draft."""
        return [] if self.started is None else self.text[self.started :]


def best_prefix(
    probabilities: Sequence[float], sequences: int, time: Callable[[int], float], gain: float
) -> tuple[int, float]:
    """The k from 1 up whose k likeliest tokens bring most beyond what their time is worth, by trying all."""
    ordered = sorted(probabilities, reverse=True)
    worth = gain * sequences / time(sequences)
    brings = {k: sum(ordered[:k]) - worth * (time(sequences + k) - time(sequences)) for k in range(1, len(ordered) + 1)}
    best = max(brings, key=lambda k: (brings[k], -k))
    return best, brings[best]


def best_cut(
    rows: Sequence[Sequence[float]],
    sequences: int,
    time: Callable[[int], float],
    gain: float,
    padded: bool = False,
) -> float:
    """What the best of all choices of beginnings of the rows' drafts brings, by trying all.

    Args:
        padded: a pass has as many tokens for each sequence as for the one with the longest draft.
    """
    worth = gain * sequences / time(sequences)
    return max(
        sum(sum(row[:n]) for row, n in zip(rows, lengths, strict=True))
        - worth * (time(sequences * (1 + max(lengths)) if padded else sequences + sum(lengths)) - time(sequences))
        for lengths in product(*(range(len(row) + 1) for row in rows))
    )


def best_of_trees_and_chains(
    rows: Sequence[Sequence[tuple[int, float]]],
    sequences: int,
    time: Callable[[int], float],
    gain: float,
    mask: float,
    padded: bool,
) -> float:
    """What the likeliest nodes bring, where they branch at a time of `mask` more, or what the likeliest chains do.

    Args:
        rows: of each node its parent in the row, -1 = none, and its probability, which never rises.
        gain: in the long run; the rule's is its geometric mean with the best of this step, a tree's mask left out.
        padded: as many nodes are taken of each row, and a pass has as many tokens for each sequence as for the one that
            has most; otherwise those that are likeliest of all.
    """
    by_row = [sorted((chance for _, chance in row), reverse=True) for row in rows]
    ratios = [1.0]
    for k in range(1, 1 + (max(map(len, rows)) if padded else sum(map(len, rows)))):
        likeliest = [row[:k] for row in by_row] if padded else [sorted([p for row in by_row for p in row])[-k:]]
        passed = sequences * (1 + k) if padded else sequences + k
        ratios.append((1 + sum(map(sum, likeliest)) / sequences) * time(sequences) / time(passed))
    gain = math.sqrt(gain * max(ratios))

    def brings(taken: Sequence[Sequence[tuple[int, float]]], numbers: Sequence[Sequence[int]]) -> float:
        widest = max(map(len, taken))
        tokens = sequences * (1 + widest) if padded else sequences + sum(map(len, taken))
        straight = all(
            [parent for parent, _ in row] == [-1, *of_row[:-1]][: len(row)]
            for row, of_row in zip(taken, numbers, strict=True)
        )
        worth = gain * sequences / time(sequences)
        cost = worth * (time(tokens) - time(sequences) + (0.0 if straight else mask))
        return sum(chance for row in taken for _, chance in row) - cost

    def best_of(numbers: Sequence[Sequence[int]]) -> float:
        """`numbers`: which nodes of each row may be taken."""
        offered = sorted((-rows[i][node][1], i, node) for i, row in enumerate(numbers) for node in row)
        found = []
        for k in range(1, 1 + (max(map(len, numbers)) if padded else len(offered))):
            best = (
                [[one for one in offered if one[1] == at][:k] for at in range(len(rows))] if padded else [offered[:k]]
            )
            chosen = [sorted(node for part in best for _, i, node in part if i == at) for at in range(len(rows))]
            taken = [[rows[at][node] for node in nodes] for at, nodes in enumerate(chosen)]
            found.append(brings(taken, chosen))
        return max(found)

    return max(best_of([range(len(row)) for row in rows]), best_of([likeliest_branch(row) for row in rows]))


def judged(rows: Sequence[Sequence[tuple[int, float]]], last: Sequence[int]) -> list[tuple[float, bool]]:
    """Of drafts that were verified, the nodes whose ancestors were right: probability behind these, and whether right.

    Args:
        rows: of each node its parent in the row, -1 = none, and its probability with its ancestors.
        last: of each row the node that was right last, -1 = none.
    """
    found = []
    for row, node in zip(rows, last, strict=True):
        right = set()
        while node >= 0:
            right.add(node)
            node = row[node][0]
        for i, (parent, chance) in enumerate(row):
            if parent < 0 or parent in right:
                found.append((chance / (1.0 if parent < 0 else row[parent][1]), i in right))
    return found


def likeliest_branch(row: Sequence[tuple[int, float]]) -> list[int]:
    """The likeliest child of the likeliest child and so on, of nodes with a parent and a probability each."""
    branch: list[int] = []
    while children := [i for i, (parent, _) in enumerate(row) if parent == (branch[-1] if branch else -1)]:
        branch.append(max(children, key=lambda child: (row[child][1], -child)))
    return branch


def initial_guess(sample: Sequence[int], length: int, position: int, highest: int | None = None) -> int:
    """The guess for a place `position` tokens behind a text of `length` tokens; see `plugins/guesses.py`.

    Args:
        sample: the tokens to guess from, in the order that they are kept in.
        highest: guess any token up to this instead.
    """
    mask = 2**64 - 1
    mixed = (length * 0x9E3779B97F4A7C15 + position) & mask
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & mask
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
    chance = mixed >> 33
    return chance % (highest + 1) if highest is not None else sample[chance % len(sample)]


def jacobi_iterate(argmax: Sequence[int], committed: int) -> list[int]:
    """The next iterate: what the target predicted behind each guess, from the first place not committed on."""
    return list(argmax[committed:])


class Lookahead:
    """The window of lookahead decoding as a list of columns, and the pool as a dictionary of lists.

    Args:
        pool: key -> its n-grams without the key, the newest first; shared by sequences.
        guess: `guess(length of the text, place)`.
    """

    def __init__(self, n: int, width: int, branches: int, pool: dict[int, list[list[int]]], guess: object) -> None:
        self.pool = pool
        self.columns: list[tuple[int, list[int]] | None] = [None] * width
        """Passes since it was guessed, and its tokens from the oldest row on; None where there is no column."""
        self.nodes: list[list[int]] = []
        """The last draft: the path of each node."""
        self._n, self._branches, self._guess = n, branches, guess

    def draft(self, text: Sequence[int], budget: int) -> list[list[int]]:
        """Paths of the nodes, in order: branches of the pool, then the trunk and what hangs on it."""
        rows, width = self._n - 1, len(self.columns)
        for place, column in enumerate(self.columns):
            if column is None:
                tokens = [self._guess(len(text), rows * place + i) for i in range(rows)]  # type: ignore[operator]
                self.columns[place] = (0, tokens)
        limit = min(budget, rows * (width + self._branches))
        drafted = width if limit == rows * (width + self._branches) else min(width, limit // (2 * rows))
        self.nodes = []
        for ngram in self.pool.get(text[-1], []):
            for i in range(1, rows + 1):
                if ngram[:i] not in self.nodes:
                    if len(self.nodes) == limit - rows * drafted:
                        break
                    self.nodes.append(ngram[:i])
            else:
                continue
            break
        trunk: list[int] = []
        self._leaves: list[list[int]] = []
        for column in self.columns[:drafted]:
            assert column is not None
            trunk = [*trunk, column[1][0]]
            for i in range(rows):
                path = trunk + column[1][1 : i + 1]
                if path not in self.nodes:
                    self.nodes.append(path)
            self._leaves.append(trunk + column[1][1:])
        return self.nodes

    def move(self, argmax: Sequence[int], committed: int) -> None:
        """Give each column what the target predicted behind it, take n-grams into the pool, move on."""
        moved: list[tuple[int, list[int]] | None] = [None] * len(self.columns)
        for place, leaf in enumerate(self._leaves):
            column = self.columns[place]
            assert column is not None
            age, tokens = column
            token = argmax[1 + self.nodes.index(leaf)]
            if age >= self._n - 2:
                remember_ngram(self.pool, tokens[0], [*tokens[1:], token], self._branches)
            moved[place] = (age + 1, [*tokens[1:], token])
        shift = committed - 1
        self.columns = [*moved[shift:], *[None] * min(shift, len(moved))]


def remember_ngram(pool: dict[int, list[list[int]]], key: int, ngram: list[int], most: int) -> None:
    """Put an n-gram first in its key's list."""
    kept = pool.setdefault(key, [])
    pool[key] = [ngram, *(old for old in kept if old != ngram)][:most]


class Recycling:
    """Token recycling: rows of likely next tokens by context, in a dictionary, and best-first trees of them.

    Args:
        belief: how often the token of each rank is next, before anything is counted.
        weight: of that belief.
    """

    def __init__(
        self,
        *,
        k: int,
        context: int,
        fresh: int,
        text: bool,
        floor: float,
        chain: bool,
        belief: Sequence[float],
        weight: float,
    ) -> None:
        self.rows: dict[tuple[int, ...], tuple[list[int], int]] = {}
        """Context -> its tokens, likeliest first, and its trust."""
        self.hits: dict[tuple[int, bool, int, int, int], int] = {}
        self.trials: dict[tuple[int, bool, int, int], int] = {}
        self._k, self._context, self._fresh, self._text = k, context, fresh, text
        self._floor, self._chain, self._belief, self._weight = floor, chain, belief, weight

    def draft(self, text: Sequence[int], most: int) -> list[tuple[int, int, float]]:
        """Nodes as (token, parent, cumulative probability)."""
        nodes: list[tuple[int, int, float]] = []
        paths: dict[int, list[int]] = {-1: []}
        waiting: list[tuple[float, int, int, int]] = []
        newest, likelihood, found = -1, 1.0, 0
        while len(nodes) < most:
            if self._chain:
                waiting = []
            for token, chance in self._candidates([*text, *paths[newest]], len(paths[newest])):
                if likelihood * chance >= self._floor:
                    waiting.append((-likelihood * chance, found, token, newest))
                    found += 1
            if not waiting:
                break
            best = min(waiting)
            waiting.remove(best)
            likelihood = -best[0]
            newest = len(nodes)
            nodes.append((best[2], best[3], likelihood))
            paths[newest] = [*paths[best[3]], best[2]]
        return nodes

    def learn(self, text: Sequence[int], nodes: Sequence[tuple[int, int]], ranked: Sequence[Sequence[int]]) -> None:
        """Take in the target's ranking behind `text`, and behind each node; an empty one says nothing."""
        paths: list[list[int]] = [[]]
        for token, parent in nodes:
            paths.append([*paths[parent + 1], token])
        for path, ranking in zip(paths, ranked, strict=False):
            for context in self._contexts([*text, *path]):
                if ranking:
                    self._write(context, list(ranking))

    def committed(self, text: Sequence[int], tokens: Sequence[int], judged: bool) -> None:
        """Count ranks for `tokens`, committed behind `text`, or learn them as text if they were not verified."""
        for depth, token in enumerate(tokens):
            before = [*text, *tokens[:depth]]
            if judged:
                self._judge(before, depth, token)
            elif self._text:
                for context in self._contexts(before):
                    old, _ = self.rows.get(context, ([], 0))
                    self.rows[context] = ([token, *(t for t in old if t != token)][: self._k], 0)

    def _contexts(self, text: Sequence[int]) -> list[tuple[int, ...]]:
        return [tuple(text[-n:]) for n in range(1, min(self._context, len(text)) + 1)]

    def _write(self, context: tuple[int, ...], ranking: list[int]) -> None:
        ranking = ranking[: self._k]
        old, trust = self.rows.get(context, ([], 0))
        trust = min(trust + 1, 3) if old and old[0] == ranking[0] else 1
        merged: list[int] = []
        for token in [*ranking[: self._fresh], *old, *ranking[self._fresh :]]:
            if token not in merged:
                merged.append(token)
        self.rows[context] = (merged[: self._k], trust)

    def _known_rows(self, text: Sequence[int], depth: int) -> list[tuple[tuple[int, bool, int, int], list[int]]]:
        """Kind and tokens of each row for a text, from the longest context down."""
        found: list[tuple[tuple[int, bool, int, int], list[int]]] = []
        for context in reversed(self._contexts(text)):
            if context in self.rows:
                tokens, trust = self.rows[context]
                found.append(((len(context), bool(found), trust, min(depth, 2)), tokens))
        return found

    def _candidates(self, text: Sequence[int], depth: int) -> list[tuple[int, float]]:
        found: dict[int, float] = {}
        left = 1.0
        for kind, tokens in self._known_rows(text, depth):
            new = {}
            taken = 0.0
            for rank, token in enumerate(tokens):
                if token not in found:
                    belief = self._belief[min(rank, len(self._belief) - 1)] * self._weight
                    share = (self.hits.get((*kind, rank), 0) + belief) / (self.trials.get(kind, 0) + self._weight)
                    new[token] = left * share
                    taken += new[token]
            found |= new
            left = max(0.0, left - taken)
        return list(found.items())

    def _judge(self, text: Sequence[int], depth: int, token: int) -> None:
        for kind, tokens in self._known_rows(text, depth):
            self.trials[kind] = self.trials.get(kind, 0) + 1
            if token in tokens:
                rank = tokens.index(token)
                self.hits[(*kind, rank)] = self.hits.get((*kind, rank), 0) + 1
                break
