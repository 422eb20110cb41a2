"""Slow and plain references for everything that has a kernel. Imports nothing of freedraft."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


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
    for length in range(min(len(text), len(learnt) - 1), 0, -1):
        suffix = list(text[len(text) - length :])
        if any(list(learnt[i : i + length]) == suffix for i in range(len(learnt) - length)):
            return length
    return 0


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
    longest = max((len(document) for document in documents), default=0)
    for length in range(min(len(text), longest), 0, -1):
        if index_continuations(documents, text[len(text) - length :], min_count):
            return length
    return 0


def index_count(documents: Sequence[Sequence[int]], context: Sequence[int]) -> int:
    """How often `context` is followed by a token of its document."""
    return sum(index_continuations(documents, context).values())


def index_likeliest(documents: Sequence[Sequence[int]], context: Sequence[int], min_count: int = 1) -> tuple[int, int]:
    """The most frequent kept continuation, of equals the smallest token, and its count."""
    found = index_continuations(documents, context, min_count)
    token = min(found, key=lambda token: (-found[token], token))
    return token, found[token]
