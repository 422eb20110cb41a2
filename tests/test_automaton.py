"""The online suffix automaton against the naive reference."""

from __future__ import annotations

import random

import naive
import numpy as np
import pytest
import strategies
from hypothesis import given, settings
from hypothesis import strategies as st

from freedraft.retrieval.automaton import SuffixAutomata
from freedraft.retrieval.errors import CapacityError, InputError
from freedraft.retrieval.growth import CHAIN_CAP
from freedraft.retrieval.memory import PAGE_BYTES, PAGE_WORDS
from freedraft.retrieval.ragged import ragged

MIB = 2**20


def automata(**options: int) -> SuffixAutomata:
    made = SuffixAutomata(**{"memory": 16 * MIB, **options})
    # Poison: nothing may rely on a fresh arena being zero.
    made._words[PAGE_WORDS:] = 0x5A5A5A5A
    return made


def assert_same(made: SuffixAutomata, slot: int, text: list[int]) -> None:
    """Every context of the text, with its counts and continuations, equals the naive one's."""
    slots = np.array([slot], np.int64)
    expected = naive.contexts(text)
    assert len(expected) <= CHAIN_CAP
    got = made.contexts(slots, CHAIN_CAP)
    assert got.length[0, len(expected) :].max(initial=-1) == -1
    for i, context in enumerate(expected):
        assert got.length[0, i] == context.length
        assert got.count[0, i] == context.count
        assert got.position[0, i] == context.ends[-1]
        assert got.first[0, i] == context.ends[0]
        assert got.likeliest[0, i] == context.likeliest
        assert got.times[0, i] == context.continuations[context.likeliest]
        assert got.recent[0, i] == context.recent
        tokens, counts, offsets = made.continuations(slots, got.state[:, i], limit=5000)
        assert offsets.tolist() == [0, len(tokens)]
        ranked = sorted(context.continuations.items(), key=lambda item: (-item[1], item[0]))
        assert list(zip(tokens.tolist(), counts.tolist(), strict=True)) == ranked


def shallow(text: list[int]) -> bool:
    """Whether no prefix has more nested contexts than the statistics' walk visits."""
    return all(len(naive.contexts(text[:n])) < CHAIN_CAP for n in range(len(text) + 1))


@given(strategies.texts(), st.data())
@settings(max_examples=300)
def test_equals_naive_at_every_length(text, data):
    made = automata()
    (slot,) = made.open(*ragged([[]]))
    for piece in data.draw(strategies.pieces(text)):
        made.extend(np.array([slot]), *ragged([piece]))
    if shallow(text):
        assert_same(made, slot, text)
    assert made.match_lengths(np.array([slot]))[0] == naive.longest_match(text)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("alphabet", [2, 4, 30, 1000])
def test_equals_naive_after_every_token(seed, alphabet):
    source = random.Random(seed)
    text: list[int] = []
    made = automata()
    slots = made.open(*ragged([[]]))
    for _ in range(90):
        token = source.randrange(alphabet)
        if text and source.random() < 0.5:
            token = text[source.randrange(len(text))]
        text.append(token)
        made.extend(slots, *ragged([[token]]))
        assert_same(made, slots[0], text)


@pytest.mark.parametrize(
    "text",
    [[], [0], [2**31 - 1], [0, 0], [7] * 30, [1, 2] * 15, list(range(40))],
    ids=["empty", "zero", "largest id", "pair", "run", "period 2", "all distinct"],
)
def test_small_and_odd_texts(text):
    made = automata()
    slots = made.open(*ragged([text]))
    assert_same(made, slots[0], text)


ADVERSARIAL = {
    "one token": [5] * 3000,
    **{f"period {p}": list(range(p)) * (3000 // p) for p in (2, 3, 7, 16, 64)},
    "fibonacci": naive.fibonacci_word(3000),
    "de bruijn": naive.de_bruijn(2, 11),
    "run, then another": [1] * 1500 + [2] + [1] * 1499,
}


@pytest.mark.parametrize("text", ADVERSARIAL.values(), ids=ADVERSARIAL.keys())
def test_adversarial_lengths_are_exact_and_counts_never_too_high(text):
    made = automata()
    slots = made.open(*ragged([text]))
    expected = naive.contexts(text)[:CHAIN_CAP]
    got = made.contexts(slots, CHAIN_CAP)
    assert got.length[0, : len(expected)].tolist() == [context.length for context in expected]
    for i, context in enumerate(expected):
        assert 1 <= got.count[0, i] <= context.count
        assert got.first[0, i] == context.ends[0]
        assert got.position[0, i] in context.ends
        assert got.likeliest[0, i] in context.continuations
        assert 1 <= got.times[0, i] <= context.continuations[got.likeliest[0, i]]


def test_counts_beyond_the_inline_counter():
    # A context seen more often than its inline counter holds, with a rival that overtakes it.
    text = [1, 2] * 20
    source = random.Random(0)
    text = [t for _ in range(700) for t in (9, 1 if source.random() < 0.5 else 2, 10 + source.randrange(500))]
    text.append(9)
    made = automata()
    slots = made.open(*ragged([text]))
    assert_same(made, slots[0], text)


def test_wide_states_keep_every_edge():
    # One token followed by thousands of others: index nodes several levels deep, copied by clones.
    source = random.Random(1)
    text = []
    for _ in range(4000):
        text += [3, source.choice([source.randrange(2**31), source.randrange(600)])]
    text += [3]
    made = automata()
    slots = made.open(*ragged([text]))
    expected = naive.contexts(text)[0]
    got = made.contexts(slots, 1)
    tokens, counts, _ = made.continuations(slots, got.state[:, 0], limit=5000)
    assert dict(zip(tokens.tolist(), counts.tolist(), strict=True)) == expected.continuations


def test_a_long_text():
    source = random.Random(2)
    text = [source.randrange(3000) for _ in range(20_000)]
    while len(text) < 131072:
        start = source.randrange(19_000)
        text += text[start : start + source.randrange(1, 60)]
        text.append(source.randrange(3000))
    made = automata(memory=64 * MIB)
    slots = made.open(*ragged([text]))
    assert made.lengths(slots)[0] == len(text)
    assert_same(made, slots[0], text)


def test_a_batch_is_its_rows():
    source = random.Random(3)
    rows = [[source.randrange(4) for _ in range(source.randrange(0, 60))] for _ in range(20)]
    more = [[source.randrange(4) for _ in range(source.randrange(0, 3))] for _ in range(20)]
    made = automata()
    slots = made.open(*ragged(rows))
    made.extend(slots, *ragged(more))
    for slot, row, added in zip(slots, rows, more, strict=True):
        assert_same(made, slot, row + added)


def test_sequences_come_and_go_without_a_trace():
    source = random.Random(4)
    made = automata(memory=4 * MIB)
    alive: dict[int, list[int]] = {}
    for _ in range(400):
        sizes = [source.randrange(3000) for _ in range(source.randrange(3))]
        rows = [[source.randrange(50) for _ in range(size)] for size in sizes]
        alive.update(zip(made.open(*ragged(rows)).tolist(), rows, strict=True))
        gone = [slot for slot in alive if source.random() < 0.5]
        made.close(np.array(gone, np.int64))
        for slot in gone:
            del alive[slot]
    for slot, text in alive.items():
        assert made.learning(np.array([slot]))[0]
        assert made.match_lengths(np.array([slot]))[0] == naive.longest_match(text)
    made.close(np.array(list(alive), np.int64))
    assert made.memory_used == 0
    # All of it can be used again by one text.
    slots = made.open(*ragged([list(range(40_000))]))
    assert made.learning(slots)[0]


class TestFullArena:
    """What happens when memory ends: the text stops learning, goes on matching, and others are not harmed."""

    def test_goes_on_matching(self):
        source = random.Random(5)
        text = [source.randrange(6) for _ in range(30_000)]
        made = automata(memory=8 * PAGE_BYTES)
        slots = made.open(*ragged([text]))
        assert not made.learning(slots)[0]
        assert made.memory_used == made.memory_total - PAGE_BYTES
        learnt = text[: made.lengths(slots)[0]]
        for _ in range(60):
            token = source.randrange(6)
            text.append(token)
            made.extend(slots, *ragged([[token]]))
            length = made.match_lengths(slots)[0]
            # The last token learnt may be missing from the structure, if memory ended in its midst.
            allowed = {naive.match_in(learnt, text[-40:]), naive.match_in(learnt[:-1], text[-40:])}
            assert length in allowed

    @pytest.mark.parametrize("seed", range(12))
    def test_the_end_of_what_was_learnt_comes_again(self, seed):
        # Memory ends in the midst of some token or other, and the text goes on as it did shortly before.
        source = random.Random(seed)
        alphabet = source.choice([2, 6, 40, 3000])
        made = automata(memory=source.randrange(4, 9) * PAGE_BYTES)
        text = [source.randrange(alphabet) for _ in range(4000)]
        slots = made.open(*ragged([text]))
        assert not made.learning(slots)[0]
        learnt = text[: made.lengths(slots)[0]]
        again = learnt[-source.randrange(1, 50) :] + [source.randrange(alphabet) for _ in range(10)]
        for token in again:
            text.append(token)
            made.extend(slots, *ragged([[token]]))
            allowed = {naive.match_in(learnt, text[-60:]), naive.match_in(learnt[:-1], text[-60:])}
            assert made.match_lengths(slots)[0] in allowed
            contexts = made.contexts(slots, CHAIN_CAP)
            for i in range(int((contexts.length[0] > 0).sum())):
                tokens, counts, _ = made.continuations(slots, contexts.state[:, i], limit=4000)
                assert dict(zip(tokens, counts, strict=True))[contexts.likeliest[0, i]] == contexts.times[0, i]
                assert contexts.times[0, i] <= counts.sum() <= contexts.count[0, i]

    def test_counts_are_exact_after_the_last_token_learnt(self):
        made = automata(max_length=8)
        slots = made.open(*ragged([[1, 2, 7, 1, 2, 8, 1, 2, 5, 1]]))
        assert made.lengths(slots)[0] == 8
        got = made.contexts(slots, 1)
        tokens, counts, _ = made.continuations(slots, got.state[:, 0])
        assert (got.length[0, 0], got.likeliest[0, 0], got.times[0, 0]) == (1, 2, 3)
        assert dict(zip(tokens, counts, strict=True)) == {2: 3}

    @pytest.mark.parametrize("bound", [1, 10, PAGE_WORDS - 1, PAGE_WORDS, PAGE_WORDS + 1])
    def test_max_length_is_exact(self, bound):
        made = automata(max_length=bound)
        slots = made.open(*ragged([list(range(bound + 3))]))
        assert made.lengths(slots)[0] == bound
        assert not made.learning(slots)[0]

    def test_no_more_texts_than_pages(self):
        made = automata(memory=4 * PAGE_BYTES)
        slots = made.open(*ragged([[]] * 4))
        with pytest.raises(CapacityError, match="memory"):
            made.open(*ragged([[]]))
        made.close(slots[:1])
        made.extend(made.open(*ragged([[]])), *ragged([[1]]))

    def test_text_after_the_end_is_drafted_from_what_was_learnt(self):
        made = automata(max_length=PAGE_WORDS)
        phrase = [9001, 9002, 9003, 9004]
        slots = made.open(*ragged([phrase + list(range(PAGE_WORDS)) + phrase[:3]]))
        assert made.lengths(slots)[0] == PAGE_WORDS
        got = made.contexts(slots, 1)
        assert (got.length[0, 0], got.likeliest[0, 0], got.position[0, 0]) == (3, 9004, 2)

    def test_others_keep_what_they_have(self):
        made = automata(memory=16 * PAGE_BYTES)
        first = made.open(*ragged([[1, 2, 3] * 10]))
        second = made.open(*ragged([list(range(100_000))]))
        assert not made.learning(second)[0]
        assert made.contexts(first, 1).length[0, 0] == 27
        third = made.open(*ragged([[1, 2, 1]]))
        assert made.contexts(third, 1).length[0, 0] == -1
        made.close(second)
        fourth = made.open(*ragged([[1, 2, 1]]))
        assert_same(made, fourth[0], [1, 2, 1])

    @given(st.integers(4, 24), strategies.texts(), st.integers(0, 10_000))
    @settings(max_examples=60)
    def test_ends_anywhere(self, pages, text, filler):
        # Whatever allocation fails first, the text stays sound.
        made = automata(memory=pages * PAGE_BYTES)
        whole = text + list(range(filler)) + text * 3
        slots = made.open(*ragged([whole]))
        got = made.contexts(slots, CHAIN_CAP)
        lengths = [n for n in got.length[0].tolist() if n >= 0]
        assert lengths == sorted(lengths, reverse=True)
        for i, length in enumerate(lengths):
            end = got.position[0, i]
            assert whole[end - length + 1 : end + 1] == whole[len(whole) - length :]
            assert whole[end + 1] == got.recent[0, i]


class TestBadInput:
    """Each refused with a clear error, and nothing changed."""

    def test_negative_id(self):
        made = automata()
        slots = made.open(*ragged([[1, 2]]))
        with pytest.raises(InputError, match="negative, got -4"):
            made.extend(slots, np.array([1, -4], np.int32), np.array([0, 2]))
        assert made.lengths(slots)[0] == 2
        with pytest.raises(InputError, match="negative, got -1"):
            made.open(np.array([-1], np.int32), np.array([0, 1]))
        made.close(slots)
        assert made.memory_used == 0

    @pytest.mark.parametrize("bad", [2**31, -1])
    def test_id_beyond_int32(self, bad):
        with pytest.raises(InputError, match=r"must be in 0\.\.2147483647"):
            automata().open(np.array([1, bad], np.int64), np.array([0, 2]))

    @pytest.mark.parametrize("offsets", [[0], [0, 1], [1, 2], [0, 3], [0, 2, 1, 2], [], [[0, 2]], [0.0, 2.0]])
    def test_offsets(self, offsets):
        with pytest.raises(InputError, match="offsets"):
            automata().open(np.array([1, 2], np.int32), np.array(offsets))

    @pytest.mark.parametrize("tokens", [[1.5], ["a"], [[1, 2]]])
    def test_not_token_ids(self, tokens):
        with pytest.raises(InputError, match=r"tokens|prompts"):
            automata().open(np.array(tokens), np.array([0, 1]))

    def test_closed_and_unknown_slots(self):
        made = automata()
        slots = made.open(*ragged([[1], [2]]))
        made.close(slots[:1])
        for bad in (slots[:1], np.array([99]), np.array([-1])):
            for call in (
                lambda bad=bad: made.extend(bad, *ragged([[1]])),
                lambda bad=bad: made.close(bad),
                lambda bad=bad: made.contexts(bad),
                lambda bad=bad: made.learning(bad),
            ):
                with pytest.raises(InputError, match="slots"):
                    call()
        with pytest.raises(InputError, match="distinct"):
            made.close(np.array([slots[1], slots[1]]))
        assert made.learning(slots[1:])[0]

    @pytest.mark.parametrize("slots", [[0.0], [[0]], ["a"], 0])
    def test_slots_that_are_none(self, slots):
        made = automata()
        made.open(*ragged([[1]]))
        for call in (made.close, made.contexts, made.lengths, made.match_lengths, made.learning):
            with pytest.raises(InputError, match="slots"):
                call(slots)

    def test_a_state_that_is_none_does_no_harm(self):
        made = automata(memory=6 * PAGE_BYTES)
        slots = made.open(*ragged([[source % 97 for source in range(0, 9000, 7)]]))
        for state in range(1, len(made.arrays.words) // 8):
            made.continuations(slots, np.array([state], np.int32), limit=2)
        for limit in (0, 2**40):
            with pytest.raises(InputError, match="limit"):
                made.continuations(slots, made.contexts(slots, 1).state[:, 0], limit=limit)

    @pytest.mark.parametrize("options", [{"memory": 100}, {"memory": 2**40}, {"max_length": 0}, {"max_length": 2**24}])
    def test_bounds(self, options):
        with pytest.raises(InputError, match=next(iter(options))):
            SuffixAutomata(**options)

    @pytest.mark.parametrize("depth", [0, CHAIN_CAP + 1])
    def test_depth(self, depth):
        made = automata()
        with pytest.raises(InputError, match="depth"):
            made.contexts(made.open(*ragged([[1]])), depth)
