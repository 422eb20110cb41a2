"""Other structures that draft from a corpus in memory, each with the same four calls for `bench/index.py`.

A contender builds from documents; `reset` begins so many sequences; `follow` takes their next tokens; `draft` returns
what it expects after each, up to 8 tokens.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from freedraft.plugins.evidence import SEPARATOR
from freedraft.retrieval.automaton import SuffixAutomata
from freedraft.retrieval.contexts import likeliest_times
from freedraft.retrieval.edges import COUNT, LENGTH, LINK, NO_TOKEN, STATE_WORDS, TARGET, TOKEN, find_edge
from freedraft.retrieval.growth import HEAD_ROOT
from freedraft.retrieval.jit import kernel

DRAFTED = 8
Tokens = NDArray[np.int32]
LONGEST_TEXT = 2**23


class Contender(Protocol):
    """One structure in the comparison."""

    def build(self, documents: Sequence[Tokens]) -> None: ...
    def reset(self, rows: int) -> None: ...
    def follow(self, tokens: Tokens, offsets: NDArray[np.int64]) -> None: ...
    def draft(self) -> Any: ...


class OnlineAutomaton:
    """freedraft's own online suffix automaton with all documents as its text, a separator between.

    It holds 2**23 tokens at most, so that a larger corpus takes several; a draft comes from the longest match.
    """

    def build(self, documents: Sequence[Tokens]) -> None:
        self.automata = SuffixAutomata(memory=6 << 30, max_length=LONGEST_TEXT)
        slots: list[int] = []
        room = 0
        separator = np.array([SEPARATOR], np.int32)
        for document in documents:
            if room < len(document) + 1:
                slots.append(int(self.automata.open(np.zeros(0, np.int32), np.array([0, 0]))[0]))
                room = LONGEST_TEXT
            tokens = np.concatenate([document, separator])
            self.automata.extend(slots[-1:], tokens, np.array([0, len(tokens)]))
            room -= len(tokens)
        self.texts = np.array(slots, np.int64)

    def reset(self, rows: int) -> None:
        self.places = np.zeros((rows, len(self.texts), 2), np.int64)
        self.places[:, :, 0] = self.automata.arrays.sequences[self.texts, HEAD_ROOT]
        self.tokens = np.zeros((rows, DRAFTED), np.int32)

    def follow(self, tokens: Tokens, offsets: NDArray[np.int64]) -> None:
        follow_plain(*self.automata.arrays, self.texts, self.places, tokens, offsets)

    def draft(self) -> Any:
        draft_plain(*self.automata.arrays, self.texts, self.places, self.tokens)
        return self.tokens

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each sequence's longest match."""
        longest: NDArray[np.int64] = self.places[:, :, 1].max(axis=1)
        return longest

    @property
    def bytes(self) -> int:
        return self.automata.memory_used


@kernel
def follow_plain(words, sequences, texts, places, tokens, offsets):  # type: ignore[no-untyped-def]
    """Move each sequence's place, a state and matched tokens, in every text."""
    states = words.reshape(-1, STATE_WORDS)
    edges = words.reshape(-1, 2)
    for row in range(len(places)):
        for i in range(len(texts)):
            header = sequences[texts[i]]
            state, matched = places[row, i, 0], places[row, i, 1]
            for at in range(offsets[row], offsets[row + 1]):
                while state != 0:
                    target = find_edge(words, states, edges, state, tokens[at])
                    if target != 0:
                        state = target
                        matched += 1
                        break
                    state = states[state, LINK]
                    matched = states[state, LENGTH]
                # As in the index, a context is one that something of its document follows.
                while state != 0 and (
                    states[state, TOKEN] == NO_TOKEN
                    or (
                        states[state, TOKEN] == SEPARATOR
                        and likeliest_times(states, header, state) == states[state, COUNT]
                    )
                ):
                    state = states[state, LINK]
                    matched = states[state, LENGTH]
                if state == 0:
                    state, matched = header[HEAD_ROOT], 0
            places[row, i, 0], places[row, i, 1] = state, matched


@kernel
def draft_plain(words, sequences, texts, places, tokens):  # type: ignore[no-untyped-def]
    """Write the most frequent continuation of each sequence's longest match, token by token."""
    states = words.reshape(-1, STATE_WORDS)
    for row in range(len(places)):
        best = 0
        for i in range(1, len(texts)):
            if places[row, i, 1] > places[row, best, 1]:
                best = i
        state = places[row, best, 0]
        for i in range(tokens.shape[1]):
            while state != 0 and states[state, TOKEN] == NO_TOKEN:
                state = states[state, LINK]
            if state == 0:
                break
            tokens[row, i] = states[state, TOKEN]
            state = states[state, TARGET]


class State:
    """A state of `PythonAutomaton`."""

    __slots__ = ("end", "following", "length", "link")

    def __init__(self, following: dict[int, int], link: int, length: int, end: int) -> None:
        self.following, self.link, self.length, self.end = following, link, length, end


class PythonAutomaton:
    """A plain suffix automaton of Python objects with a dictionary a state: what SAM-Decoding keeps and pickles.

    A draft is the text after the first occurrence of the longest match, as there.
    """

    def build(self, documents: Sequence[Tokens]) -> None:
        self.states = [State({}, -1, 0, 0)]
        self.text: list[int] = []
        last = 0
        for document in documents:
            for token in [*document.tolist(), SEPARATOR]:
                self.text.append(token)
                last = self._add(last, token)

    def _add(self, last: int, token: int) -> int:
        states = self.states
        new = len(states)
        states.append(State({}, 0, len(self.text), len(self.text)))
        while last != -1 and token not in states[last].following:
            states[last].following[token] = new
            last = states[last].link
        if last == -1:
            return new
        target = states[last].following[token]
        if states[target].length == states[last].length + 1:
            states[new].link = target
            return new
        copy = len(states)
        old = states[target]
        states.append(State(dict(old.following), old.link, states[last].length + 1, old.end))
        while last != -1 and states[last].following.get(token) == target:
            states[last].following[token] = copy
            last = states[last].link
        states[target].link = states[new].link = copy
        return new

    def reset(self, rows: int) -> None:
        self.places = [(0, 0)] * rows

    def follow(self, tokens: Tokens, offsets: NDArray[np.int64]) -> None:
        states = self.states
        for row, (start, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
            state, matched = self.places[row]
            for token in tokens[start:end].tolist():
                while state != 0 and token not in states[state].following:
                    state = states[state].link
                    matched = states[state].length
                following = states[state].following.get(token)
                state, matched = (0, 0) if following is None else (following, matched + 1)
            self.places[row] = state, matched

    def draft(self) -> Any:
        return [self.text[self.states[state].end : self.states[state].end + DRAFTED] for state, _ in self.places]

    def save(self, path: str) -> None:
        with open(path, "wb") as file:
            pickle.dump((self.states, self.text), file, pickle.HIGHEST_PROTOCOL)

    def load(self, path: str) -> None:
        with open(path, "rb") as file:
            self.states, self.text = pickle.load(file)


class SuffixDecoding:
    """arctic-inference's suffix cache with a cached reply for each document; depth as vLLM sets it.

    Its tree is asked with the last tokens each time, and so follows nothing: `draft` does all.
    """

    depth = 24

    def build(self, documents: Sequence[Tokens]) -> None:
        from arctic_inference.suffix_decoding import SuffixDecodingCache

        self.cache = SuffixDecodingCache(max_tree_depth=self.depth, max_cached_requests=-1)
        nothing = np.zeros(0, np.int32)
        for number, document in enumerate(documents):
            self.cache.start_request(number, nothing)
            self.cache.add_active_response(number, document)
            self.cache.stop_request(number)

    def reset(self, rows: int) -> None:
        self.tails = [np.zeros(0, np.int32)] * rows
        for row in range(rows):
            name = f"row {row}"
            if name in self.cache.active_requests:
                self.cache.stop_request(name)
            self.cache.start_request(name, np.zeros(0, np.int32))

    def follow(self, tokens: Tokens, offsets: NDArray[np.int64]) -> None:
        for row, tail in enumerate(self.tails):
            new = tokens[offsets[row] : offsets[row + 1]]
            self.tails[row] = np.concatenate([tail, new])[-self.depth :]

    def draft(self) -> Any:
        return [
            self.cache.speculate(
                f"row {row}", tail, max_spec_tokens=DRAFTED, max_spec_factor=100.0, min_token_prob=0.0
            ).token_ids
            for row, tail in enumerate(self.tails)
        ]
