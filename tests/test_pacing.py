"""Pacing: the prefix rule against brute force, decisions, account. T(n) is told, or learnt on made-up clocks."""

from __future__ import annotations

import json
from itertools import pairwise

import drafters
import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from freedraft.plugins.base import Drafts
from freedraft.plugins.config import parse_config
from freedraft.plugins.pacing import Pacer, PacingSettings, pacer_for
from freedraft.plugins.pacing_choice import choices
from freedraft.plugins.pacing_rule import best_number, best_ratio, expected_by_number, expected_by_width
from freedraft.plugins.registry import make_drafter
from freedraft.plugins.step_time import GRID, TREE, StepTime, interpolate
from freedraft.retrieval.errors import ConfigError

chances = st.floats(0.01, 1).map(lambda p: float(np.float32(p)))


def chains(rows):
    """Drafts of chains with the given cumulative probabilities."""
    lengths = [len(row) for row in rows]
    total = sum(lengths)
    return Drafts(
        np.arange(total, dtype=np.int32),
        np.array([i - 1 for n in lengths for i in range(n)], np.int32),
        np.array([p for row in rows for p in row], np.float32),
        np.ones(total, np.uint8),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    )


def best_prefix(probability, sequences, *knots_and_gain):
    """The number of likeliest tokens that brings most, and what it brings."""
    return best_number(expected_by_number(probability), 1, sequences, *knots_and_gain)


def best_width(drafts, sequences, *knots_and_gain):
    """The same of each draft's likeliest, in padded passes."""
    expected = expected_by_width(drafts.probability, drafts.offsets)
    return best_number(expected, sequences, sequences, *knots_and_gain)


def odds_times(probability, factor):
    """The probability with `factor` times the odds."""
    odds = factor * probability / (1 - probability)
    return odds / (1 + odds)


def tree_and_token(probability):
    """Drafts of a tree and of one token, of that probability.

    Nodes 0-1-2 of the tree are one branch, 3-4 another, of which 3 hangs on 0.
    """
    return Drafts(
        np.array([10, 11, 12, 13, 14, 20], np.int32),
        np.array([-1, 0, 1, 0, 3, -1], np.int32),
        np.array([0.9, 0.05, 0.04, 0.8, 0.7, probability], np.float32),
        np.zeros(6, np.uint8),
        np.array([0, 5, 6], np.int64),
    )


def falling(conditional):
    """Cumulative probabilities of conditional ones."""
    return np.cumprod(np.array(conditional, np.float32)).tolist()


def grown(source, count):
    """The nodes of a random tree: the parent of each, and its cumulative probability."""
    nodes = []
    for node in range(count):
        parent = int(source.integers(-1, node)) if node else -1
        nodes.append((parent, float(np.float32(source.random() * (1.0 if parent < 0 else nodes[parent][1])))))
    return nodes


rows_of_chances = st.lists(st.lists(chances, max_size=3).map(falling), min_size=1, max_size=3)


@st.composite
def shapes(draw):
    """A non-falling T(n) on the grid, 1 at first."""
    rises = draw(st.lists(st.floats(0, 0.5), min_size=len(GRID), max_size=len(GRID)))
    return np.cumsum([1.0, *rises[1:]])


def flat(slope):
    return 1.0 + slope * (GRID - 1)


def told(slope, settings=None):
    """A pacer that knows that n tokens take 1 + slope x (n - 1)."""
    pacer = Pacer(settings)
    pacer.step_time = StepTime.known(lambda n: 1 + slope * (n - 1))
    return pacer


def taught(slope, settings=None, sequences=1):
    """A pacer that has seen plenty of steps, of 0.01 s x (1 + slope x d)."""
    pacer = Pacer(settings)
    for _ in range(30):
        for d in range(24):
            pacer.record(sequences, d, 0.01 * (1 + slope * d))
    return pacer


class TestRule:
    @given(st.lists(chances, min_size=1, max_size=20), st.integers(1, 40), shapes(), st.floats(1, 3))
    def test_equals_brute_force(self, probability, sequences, shape, gain):
        keep, surplus = best_prefix(np.array(probability, np.float32), sequences, *knots(shape, sequences), gain)
        expected, best = naive.best_prefix(probability, sequences, lambda n: shape_at(shape, n), gain)
        assert surplus == pytest.approx(best, abs=1e-6)
        if keep != expected:  # only where two are as good as one another
            worth = gain * sequences / shape_at(shape, sequences)
            price = worth * (shape_at(shape, sequences + keep) - shape_at(shape, sequences))
            assert sum(sorted(probability, reverse=True)[:keep]) - price == pytest.approx(best, abs=1e-6)

    @given(rows_of_chances, st.integers(0, 3), shapes(), st.floats(1, 3))
    @settings(max_examples=150)
    def test_is_the_best_of_all_choices(self, rows, idle, shape, gain):
        """Not only of all prefixes: of every way to cut every draft."""
        drafts = chains(rows)
        if not len(drafts.tokens):
            return
        _, surplus = best_prefix(drafts.probability, len(rows) + idle, *knots(shape, len(rows) + idle), gain)
        best = naive.best_cut(rows, len(rows) + idle, lambda n: shape_at(shape, n), gain)
        assert max(surplus, 0) == pytest.approx(best, abs=1e-6)

    def test_free_tokens_are_all_taken_and_dear_ones_none(self):
        probability = np.array([0.9, 0.5, 0.1], np.float32)
        assert best_prefix(probability, 1, *knots(flat(0), 1), 1.0) == (3, pytest.approx(1.5))
        assert best_prefix(probability, 1, *knots(flat(5), 1), 1.0)[1] < 0

    def test_the_boundary_is_where_probability_meets_the_price(self):
        # A token costs 0.25 of a step, and a step commits 2 tokens otherwise: it pays from 0.5 up.
        probability = np.array([0.9, 0.8, 0.51, 0.49, 0.15], np.float32)
        assert best_prefix(probability, 1, *knots(flat(0.25), 1), 2.0)[0] == 3
        assert best_prefix(probability, 1, *knots(flat(0.25), 1), 1.0)[0] == 4

    def test_a_copys_tokens_are_worth_what_they_cost_there(self):
        """By the running gain of 1.5 alone, a token that costs 0.2 of a step would have to bring 0.3 in any of them."""

        def kept(row):
            pacer = told(0.2, PacingSettings(margin=0))
            pacer._now.tokens, pacer._now.time = 150.0, 100.0
            return len(pacer.cut(chains([row]), 1).tokens)

        # A step with three of these brings 3.7 tokens in 1.6 steps: the fourth, at 0.34, would save but a part of one.
        assert kept(falling([0.95, 0.95, 0.95, 0.4])) == 3
        # Where there is nothing better, it would save a whole one.
        assert kept([0.26]) == 1
        assert kept([0.24]) == 0

    def test_maximises_tokens_over_time_in_the_long_run(self):
        """Over many steps with all kinds of drafts, no fixed threshold on the probability does better."""
        source = np.random.default_rng(0)
        rows = [falling(source.uniform(0.1, 1, 8) ** source.choice([0.3, 3])) for _ in range(3000)]

        def rate(lengths):
            tokens = sum(1 + sum(row[:n]) for row, n in zip(rows, lengths, strict=True))
            return tokens / sum(1 + 0.1 * n for n in lengths)

        pacer = Pacer(PacingSettings(margin=0))
        pacer.step_time = StepTime.known(lambda n: 1 + 0.1 * (n - 1))
        ours = rate([len(pacer.cut(chains([row]), 1).tokens) for row in rows])
        fixed = max(rate([sum(p > least for p in row) for row in rows]) for least in np.linspace(0, 1, 41))
        single = rate([max(best_prefix(np.array(row, np.float32), 1, *knots(flat(0.1), 1), 1.0)[0], 0) for row in rows])
        assert ours > 0.995 * fixed
        assert ours > single
        assert pacer.gain == pytest.approx(ours, rel=0.05)


def shape_at(shape, n):
    return float(interpolate(GRID, shape, n))


def knots(shape, sequences):
    return shape_at(shape, sequences), GRID, shape


class TestCut:
    @given(rows_of_chances, st.floats(0, 0.6))
    @settings(max_examples=150)
    def test_keeps_the_likeliest_as_whole_beginnings(self, rows, slope):
        drafts = chains(rows)
        pacer = told(slope)
        before = drafts.probability.copy()
        cut = pacer.cut(drafts, len(rows))
        assert (drafts.probability == before).all()
        assert cut.rows == drafts.rows
        for i in range(cut.rows):
            kept, whole = cut.row(i), drafts.row(i)
            n = kept.stop - kept.start
            assert cut.tokens[kept].tolist() == drafts.tokens[whole][:n].tolist()
            assert cut.parents[kept].tolist() == list(range(-1, n - 1))
            assert cut.probability[kept].tolist() == drafts.probability[whole][:n].tolist()
        if len(cut.tokens):
            knots = pacer.step_time.knots(len(rows))
            gain = best_ratio(expected_by_number(drafts.probability), 1, len(rows), *knots) ** 0.5
            keep, surplus = best_prefix(drafts.probability, len(rows), *knots, gain)
            assert len(cut.tokens) == keep
            assert surplus > 0.02 * len(rows)
            left_out = sorted(drafts.probability.tolist(), reverse=True)[keep:]
            assert cut.probability.min() >= max(left_out, default=0)

    def test_of_equals_just_as_many_as_pay(self):
        pacer = Pacer()
        pacer.step_time = StepTime.known(lambda n: 1 + 0.5 * max(0, n - 16))
        drafts = chains([[0.3]] * 40)
        cut = pacer.cut(drafts, 1)
        keep, _ = best_prefix(drafts.probability, 1, *pacer.step_time.knots(1), 1.0)
        assert 1 < keep < 40
        assert len(cut.tokens) == keep

    def test_trees_keep_their_parents(self):
        cut = told(0.2).cut(tree_and_token(0.9), 2)
        assert cut.tokens.tolist() == [10, 13, 14, 20]
        assert cut.parents.tolist() == [-1, 0, 1, -1]
        assert cut.offsets.tolist() == [0, 3, 4]

    @pytest.mark.parametrize("bad", [[0.2, 0.9, 0.9], [np.nan] * 3, [0.9, np.nan, 0.9], [7.0, 7.0, 7.0], [-1.0] * 3])
    def test_a_drafter_that_misjudges_gets_sound_drafts(self, bad):
        for slope in (0.0, 0.1, 0.4):
            cut = told(slope).cut(chains([bad, [0.9]]), 2)
            for i in range(2):
                row = cut.row(i)
                assert cut.parents[row].tolist() == list(range(-1, row.stop - row.start - 1))

    def test_nothing_drafted_is_nothing(self):
        pacer = Pacer()
        drafts = Drafts.empty(3)
        assert pacer.cut(drafts, 3) is drafts
        assert pacer.steps == 0


class TestTrust:
    """What probabilities were worth lately."""

    drafted = chains([[0.8, 0.6, 0.3, 0.2]])

    def judged(self, right, times=30):
        pacer = told(0.1)
        for _ in range(times):
            pacer.cut(self.drafted, 1)
            pacer.judge(self.drafted.probability, self.drafted.offsets, np.array([right - 1]))
        return pacer

    def test_nothing_is_held_against_what_is_new(self):
        assert told(0.1).trust == 1.0

    def test_what_was_right_as_often_as_expected_or_more_often_is_believed(self):
        assert self.judged(4).trust == 1.0
        pacer = told(0.1)
        for i in range(200):
            pacer.judge(
                self.drafted.probability, self.drafted.offsets, np.array([[1, 2, 0, 3, -1, 1, 2, 0, 3, -1][i % 10]])
            )
        assert pacer.trust > 0.9

    def test_calibrated_drafts_are_believed_on_the_whole(self):
        source = np.random.default_rng(0)
        for rows in (1, 64):
            pacer = told(0.1)
            drafts = chains([[0.8, 0.56, 0.45]] * rows)
            seen = []
            for _ in range(2000):
                right = (np.cumprod(source.random((rows, 3)) < [0.8, 0.7, 0.8036], axis=1)).sum(axis=1)
                pacer.cut(Drafts.empty(1), 1)
                pacer.judge(drafts.probability, drafts.offsets, right - 1)
                seen.append(pacer.trust)
            assert np.mean(seen) > 0.98

    def test_where_less_was_right_less_is_verified(self):
        believed, doubted = told(0.1), self.judged(0)
        assert 0.2 < doubted.trust < 0.3
        few, many = (len(pacer.cut(self.drafted, 1).tokens) for pacer in (doubted, believed))
        assert 0 < few < many
        assert doubted.floor(1, 8) > believed.floor(1, 8)
        # What is verified keeps its probabilities, which are judged again.
        assert doubted.cut(self.drafted, 1).probability.tolist() == self.drafted.probability[:few].tolist()

    def test_it_comes_back_with_better_drafts_and_with_time(self):
        better, waiting = self.judged(0), self.judged(0)
        least = better.trust
        for _ in range(60):
            better.judge(self.drafted.probability, self.drafted.offsets, np.array([3]))
        for _ in range(1000):
            waiting.cut(Drafts.empty(1), 1)
        assert least < 0.3
        assert better.trust > 0.95
        assert waiting.trust > 0.95

    def test_trees_are_judged_along_their_path(self):
        pacer = told(0.1)
        tree = tree_and_token(0.7)
        for _ in range(30):
            pacer.judge(tree.probability, tree.offsets, np.array([4, 0]), tree.parents)
        assert pacer.trust == 1.0
        for _ in range(60):
            pacer.judge(tree.probability, tree.offsets, np.array([0, -1]), tree.parents)
        assert 0.4 < pacer.trust < 0.6

    def test_uniform_drafts_are_doubted_too(self):
        pacer = told(0.2)
        pacer.settings = PacingSettings(uniform=True)
        assert len(pacer.cut(self.drafted, 1, 4).tokens) == 4
        for _ in range(40):
            pacer.judge(self.drafted.probability, self.drafted.offsets, np.array([-1]))
        assert not len(pacer.cut(self.drafted, 1, 4).tokens)


class TestPadded:
    """Passes that take as many tokens for every sequence as for the one with the longest draft."""

    @given(rows_of_chances, st.integers(0, 3), shapes(), st.floats(1, 3))
    @settings(max_examples=150)
    def test_the_width_is_the_best_of_all_choices(self, rows, idle, shape, gain):
        drafts = chains(rows)
        if not len(drafts.tokens):
            return
        sequences = len(rows) + idle
        width, surplus = best_width(drafts, sequences, *knots(shape, sequences), gain)
        best = naive.best_cut(rows, sequences, lambda n: shape_at(shape, n), gain, padded=True)
        assert max(surplus, 0) == pytest.approx(best, abs=1e-6)
        price = gain * sequences * (shape_at(shape, sequences * (1 + width)) / shape_at(shape, sequences) - 1)
        assert surplus == pytest.approx(sum(sum(row[:width]) for row in rows) - price, abs=1e-6)

    def test_what_is_padded_anyway_is_verified(self):
        drafts = chains([[0.9, 0.8], [0.1, 0.1], []])
        assert told(0.1).cut(drafts, 3).tokens.tolist() == [0, 1]
        cut = told(0.1).cut(drafts, 3, padded=True)
        assert cut.tokens.tolist() == [0, 1, 2, 3]
        assert cut.offsets.tolist() == [0, 2, 4, 4]

    def test_one_good_draft_does_not_pay_for_many_sequences(self):
        drafts = chains([[0.9], *[[]] * 9])
        assert len(told(0.05).cut(drafts, 10).tokens) == 1
        assert len(told(0.05).cut(drafts, 10, padded=True).tokens) == 0
        uniform = PacingSettings(uniform=True)
        assert len(told(0.05, uniform).cut(drafts, 10).tokens) == 1
        assert len(told(0.05, uniform).cut(drafts, 10, padded=True).tokens) == 0

    def test_trees_keep_the_likeliest_nodes_of_each(self):
        cut = told(0.15).cut(tree_and_token(0.2), 2, padded=True)
        assert cut.tokens.tolist() == [10, 13, 14, 20]
        assert cut.parents.tolist() == [-1, 0, 1, -1]
        assert cut.offsets.tolist() == [0, 3, 4]

    def test_for_one_sequence_it_is_the_same(self):
        drafts = chains([[0.9, 0.6, 0.3, 0.05]])
        for slope in (0.0, 0.1, 0.4):
            one, other = told(slope).cut(drafts, 1), told(slope).cut(drafts, 1, padded=True)
            assert one.tokens.tolist() == other.tokens.tolist()

    def test_the_gain_counts_what_is_padded(self):
        """Rows of one and of no tokens: the pass has two tokens for each."""
        pacer = Pacer(PacingSettings(margin=0, explore=10**6))
        pacer.step_time = StepTime.known(lambda n: 1 + 0.05 * (n - 4))
        for _ in range(3000):
            assert len(pacer.cut(chains([[0.9], [0.9], [], []]), 4, padded=True).tokens) == 2
        assert pacer.gain == pytest.approx((1 + 1.8 / 4) / 1.2, rel=0.02)


class TestClosedLoop:
    """What is decided is what is measured: a machine whose steps take T(n), and drafts of one kind."""

    def run(self, pacer, time, steps, sequences=lambda step: 1, chance=lambda step: 0.95):
        lengths = []
        for step in range(steps):
            rows = sequences(step)
            cut = pacer.cut(chains([falling([chance(step)] * 12)] * rows), rows)
            lengths.append(len(cut.tokens) / rows)
            pacer.record(rows, len(cut.tokens), time(rows + len(cut.tokens), step))
        return lengths

    @pytest.mark.parametrize("spills", [True, False])
    def test_one_slow_step_does_not_end_drafting(self, spills):
        """On a CPU 2 to 9 tokens cost 1.75 steps, and more of them more; the first long draft met a hiccup."""
        pacer = Pacer()
        pacer.spills = spills
        slow = []

        def time(tokens, step):
            usual = 0.05 * (1 if tokens == 1 else 1.75 if tokens <= 9 else tokens / 5)
            if tokens > 4 and not slow:
                slow.append(step)
                return 20 * usual
            return usual

        lengths = self.run(pacer, time, 400)
        assert slow
        assert np.median(lengths[-100:]) >= 6

    def test_drafts_where_sequences_come_and_go(self):
        source = np.random.default_rng(0)
        lengths = self.run(
            Pacer(), lambda tokens, step: 0.05 * (1 + 0.01 * tokens), 40, lambda step: int(source.integers(9, 13))
        )
        assert sum(length > 0 for length in lengths) > 25

    def test_each_batch_size_has_its_own_costs(self):
        """Eight sequences pay for every token; one pays for two to nine what it pays for ten.

        Then the single one gets drafts as good as those of a pacer that is told.
        """
        chances = np.random.default_rng(0).uniform(0.5, 0.9, 1200)

        def eight(step):
            return step // 300 % 2 == 1

        def time(tokens, step):
            return 0.09 * (1 + 0.3 * (tokens - 8)) if eight(step) else 0.05 * (1 if tokens == 1 else 1.7)

        def rate(lengths, steps):
            expected = [1 + sum(falling([chances[step]] * int(lengths[step]))) for step in steps]
            return sum(expected) / sum(time(1 + lengths[step], step) for step in steps)

        pacer = Pacer()
        lengths = self.run(pacer, time, 1200, lambda step: 8 if eight(step) else 1, chance=lambda step: chances[step])
        informed = Pacer(PacingSettings(explore=10**6))
        informed.step_time = StepTime.known(lambda n: 1 if n == 1 else 1.7)
        best = self.run(informed, time, 1200, chance=lambda step: chances[step])
        single = [step for step in range(700, 900) if not eight(step)]
        assert rate(lengths, single) > 0.97 * rate(best, single)
        assert pacer.step_time.cost(8, 8) == pytest.approx(3.4, rel=0.3)

    def test_looks_again_at_once_where_a_plain_step_was_better_than_thought(self):
        """At twice plain's speed trials are rare, but a plain step in half its time changes all."""
        pacer = Pacer()
        self.run(pacer, lambda tokens, step: 0.05 * (1 + 0.05 * tokens), 400)
        assert pacer.gain > 2
        plain = self.run(pacer, lambda tokens, step: 0.01 if tokens == 1 else 0.05 * (1 + 0.05 * tokens), 260)
        first = plain.index(0)
        assert 0 in plain[first + 2 : first + 5]

    def test_where_drafts_do_not_spill_one_plain_step_is_a_trial(self):
        for spills, together in ((True, 2), (False, 1)):
            pacer = Pacer()
            pacer.spills = spills
            lengths = self.run(pacer, lambda tokens, step: 0.05 * (1 + 0.05 * tokens), 600)
            plain = [step for step, length in enumerate(lengths) if not length and step > 20]
            runs = sum(1 for step in plain if step - 1 not in plain)
            assert runs
            assert len(plain) == together * runs


class TestFloor:
    @given(rows_of_chances, st.floats(0, 0.6), st.floats(1, 3))
    @settings(max_examples=100)
    def test_what_lies_below_is_never_kept(self, rows, slope, gain):
        drafts = chains(rows)
        pacer = told(slope)
        pacer._now.tokens = gain
        least = pacer.floor(len(rows), 24)
        cut = pacer.cut(drafts, len(rows))
        assert 0 <= least <= 1
        if len(cut.tokens):
            assert cut.probability.min() >= least - 1e-3

    def test_is_the_price_of_a_token(self):
        pacer = Pacer()
        pacer.step_time = StepTime.known(lambda n: 1 + 0.2 * (n - 1))
        assert pacer.floor(1, 24) == pytest.approx(0.2)
        pacer.step_time = StepTime.known(lambda n: max(1.0, n / 64))
        assert pacer.floor(1, 24) == 0  # free up to 64 tokens
        assert pacer.floor(128, 512) == pytest.approx(1.0)

    def test_follows_the_last_cut(self):
        pacer = Pacer()
        pacer.step_time = StepTime.known(lambda n: max(1.0, 1 + 0.5 * (n - 3)))
        drafts = chains([falling([0.8] * 6)])
        assert pacer.floor(1, 8) == 0
        cut = pacer.cut(drafts, 1)
        assert len(cut.tokens) == 2
        assert pacer.floor(1, 8) == pytest.approx(odds_times(0.8**3, 1 / 3))
        # What is left of a draft is all kept: the next may be whole again.
        assert len(pacer.cut(chains([[0.8]]), 1).tokens) == 1
        assert pacer.floor(1, 8) == 0

    @pytest.mark.parametrize(("rows", "part"), [(4, 0.5), (64, 0.8)])
    def test_is_nearer_to_the_last_cut_in_a_larger_batch(self, rows, part):
        pacer = Pacer()
        pacer.step_time = StepTime.known(lambda n: max(1.0, 1 + 0.5 / rows * (n - 3 * rows)))
        cut = pacer.cut(chains([falling([0.8] * 6)] * rows), rows)
        assert len(cut.tokens) == 2 * rows
        assert pacer.floor(rows, 8 * rows) == pytest.approx(odds_times(0.8**3, part))

    def test_of_nearly_certain_tokens_only_the_more_certain_are_drafted(self):
        """A batch full of copies, of which the step has room for some tokens."""
        pacer = Pacer()
        pacer.step_time = StepTime.known(lambda n: max(1.0, n / 300))
        sure = [[(0.98 + row / 13_000) ** i for i in range(1, 25)] for row in range(256)]
        kept = pacer.cut(chains(sure), 256)
        assert 0 < len(kept.tokens) < 24 * 256
        likely = float(kept.probability.min())
        assert likely > 0.9
        assert 1 - pacer.floor(256, 24 * 256) < 1.25 * (1 - likely)

    def test_the_end_of_a_copy_does_not_hold_back_what_comes_after_it(self):
        """A token that costs 0.06 of a step is not worth it at the end of a copy, but is after it, at 0.3."""
        pacer = told(0.06)
        assert len(pacer.cut(chains([[0.95, 0.9, 0.85, 0.1]]), 1).tokens) == 3
        assert pacer.floor(1, 8) < 0.1
        assert len(pacer.cut(chains([[0.3]]), 1).tokens) == 1

    def test_a_step_without_a_draft_lifts_it(self):
        pacer = Pacer()
        pacer.step_time = StepTime.known(lambda n: max(1.0, 1 + 0.5 * (n - 3)))
        pacer.cut(chains([falling([0.8] * 6)]), 1)
        assert pacer.floor(1, 8) > 0.2
        pacer.cut(Drafts.empty(1), 1)
        assert pacer.floor(1, 8) == 0

    def test_is_lifted_when_it_is_time_to_try(self):
        pacer = Pacer(PacingSettings(explore=10))
        pacer.step_time = StepTime.known(lambda n: 1 + 0.9 * (n - 1))
        for _ in range(10):
            assert pacer.floor(1, 8) > 0.8
            pacer.cut(Drafts.empty(1), 1)
        assert pacer.floor(1, 8) == 0
        assert len(pacer.cut(chains([[0.5]]), 1).tokens) == 1
        assert pacer.floor(1, 8) > 0.8

    def test_nothing_is_held_back_before_anything_was_measured(self):
        assert Pacer().floor(4, 100) == 0


class TestDecisions:
    def test_plain_steps_come_first(self):
        pacer = Pacer()
        drafts = chains([[0.99, 0.98]])
        for _ in range(Pacer.FIRST_PLAIN):
            assert not len(pacer.cut(drafts, 1).tokens)
            pacer.record(1, 0, 0.01)
        assert len(pacer.cut(drafts, 1).tokens) == 2

    def test_what_does_not_pay_is_tried_now_and_then(self):
        pacer = told(3.0, PacingSettings(explore=10))
        drafts = chains([[0.5, 0.4, 0.3]])
        tried = []
        for step in range(100):
            cut = pacer.cut(drafts, 1)
            tried += [step] if len(cut.tokens) else []
            pacer.record(1, len(cut.tokens), 0.01 * (1 + 3.0 * len(cut.tokens)))
        assert len(tried) == pacer.explored == pacer.verified == 9
        assert {b - a for a, b in pairwise(tried)} == {11}

    def test_a_trial_costs_as_little_as_can_be(self):
        pacer = told(3.0, PacingSettings(explore=2))
        drafts = chains([[0.5, 0.4, 0.3]] * 50)
        cuts = [len(pacer.cut(drafts, 50).tokens) for _ in range(10)]
        assert 0 < max(cuts) < 150

    def test_plain_steps_are_tried_now_and_then(self):
        pacer = told(0.0, PacingSettings(explore=10))
        drafts = chains([[0.99] * 6])
        plain = sum(not len(pacer.cut(drafts, 1).tokens) for _ in range(110))
        assert plain == pacer.explored == 10

    @pytest.mark.parametrize(("probability", "every"), [(0.05, 25), (0.25, 80), (0.9, 189)])
    def test_plain_steps_are_tried_the_oftener_the_less_they_cost(self, probability, every):
        pacer = told(0.0, PacingSettings(explore=100))
        drafts = chains([[probability]])
        steps = 4000
        plain = sum(not len(pacer.cut(drafts, 1).tokens) for _ in range(steps))
        assert plain == pacer.explored
        assert 0.9 < plain / (2 * steps / (every + 2)) < 1.1
        assert plain / steps * (1 - 1 / pacer.gain) < 0.006

    def test_steps_without_a_draft_save_that_trial(self):
        pacer = told(0.0, PacingSettings(explore=10))
        drafts = chains([[0.9, 0.8]])
        for _ in range(30):
            for _ in range(5):
                assert len(pacer.cut(drafts, 1).tokens)
            for _ in range(2):
                pacer.cut(Drafts.empty(1), 1)
        assert pacer.explored == 0

    def test_a_plain_step_is_measured_behind_another_one_alone(self):
        """What a draft costs shows in part in the step after it."""
        pacer = taught(0.0, PacingSettings(explore=10))
        drafts = chains([[0.9, 0.8]])
        seen = []
        for _ in range(60):
            kept = len(pacer.cut(drafts, 1).tokens)
            before = pacer.step_time.plain_steps + pacer.step_time.draft_steps
            # The first plain step takes as long as one with a draft.
            slow = kept or (not seen or seen[-1][0])
            pacer.record(1, kept, 0.012 if slow else 0.01)
            seen.append((kept, pacer.step_time.plain_steps + pacer.step_time.draft_steps - before))
        plain = [i for i, (kept, _) in enumerate(seen) if not kept]
        assert len(plain) > 2
        for i in plain:
            assert seen[i][1] == (seen[i - 1][0] == 0)
        assert all(counted for kept, counted in seen if kept)

    def test_a_gain_below_the_margin_is_left(self):
        drafts = chains([[0.55]])
        # Half a step's time for 0.55 tokens: a gain of 0.05.
        assert len(told(0.5, PacingSettings(margin=0.02)).cut(drafts, 1).tokens) == 1
        assert len(told(0.5, PacingSettings(margin=0.08)).cut(drafts, 1).tokens) == 0

    def test_uniform_is_all_or_nothing(self):
        settings = PacingSettings(uniform=True)
        good, poor = chains([[0.9, 0.8], [0.9, 0.1]]), chains([[0.9, 0.01], [0.01, 0.01]])
        pacer = told(0.25, settings)
        assert len(pacer.cut(good, 2).tokens) == 4
        assert len(pacer.cut(poor, 2).tokens) == 0
        assert len(told(0.25).cut(poor, 2).tokens) == 1

    def test_uniform_weighs_what_drafts_are_filled_up_with(self):
        pacer = Pacer(PacingSettings(uniform=True, explore=1000))
        pacer.step_time = StepTime.known(lambda n: 1 + 0.1 * (n - 1))
        drafts = chains([[0.9, 0.8], []])
        # Beside two sequences, two tokens cost 0.36 of a plain step's tokens, four 0.73, and twenty 3.6.
        assert len(pacer.cut(drafts, 2, filled=20).tokens) == 0
        assert len(pacer.cut(drafts, 2, filled=4).tokens) == 2
        latest = (1 + 1.7 / 2) / (1.5 / 1.1)
        assert 1 < pacer.gain < latest
        for _ in range(2000):
            pacer.cut(drafts, 2, filled=4)
        assert pacer.gain == pytest.approx(latest, rel=0.01)

    def test_nothing_need_be_held_back_where_drafts_are_uniform(self):
        pacer = Pacer(PacingSettings(uniform=True))
        pacer.step_time = StepTime.known(lambda n: 1 + 0.2 * (n - 1))
        assert pacer.floor(1, 24) == 0

    def test_each_step_with_a_draft_is_one_decision(self):
        pacer = told(0.0, PacingSettings(explore=10))
        for probability in (0.99, 0.001):
            for _ in range(60):
                pacer.cut(chains([[probability]]), 1)
            pacer.cut(Drafts.empty(1), 1)
        made = pacer.decisions
        assert sum(made.values()) == pacer.steps == 120
        assert made["explored"] == pacer.explored > 2
        assert made["verified"] > 40
        assert made["plain"] > 40

    def test_never_slower_than_nothing_when_drafts_are_worthless(self):
        """On a clock where a verified token costs half a step and none is right: within 2 % of plain steps."""
        pacer = Pacer()
        drafts = chains([[0.3, 0.2, 0.1]])
        time = 0.0
        for _ in range(2000):
            drafted = len(pacer.cut(drafts, 1).tokens)
            seconds = 0.01 * (1 + 0.5 * drafted)
            pacer.record(1, drafted, seconds)
            time += seconds
        assert time < 1.02 * 2000 * 0.01

    def test_follows_a_load_that_comes_and_goes(self):
        pacer = Pacer()
        drafts = chains([[0.6, 0.5, 0.4, 0.3]])

        def run(slope, steps):
            kept = []
            for _ in range(steps):
                kept.append(len(pacer.cut(drafts, 1).tokens))
                pacer.record(1, kept[-1], 0.01 * (1 + slope * kept[-1]))
            return kept

        assert np.mean(run(0.01, 300)[-50:]) > 3.5
        assert np.mean(run(2.0, 300)[-50:]) < 0.2
        # Back up after the next trial, which comes within a hundred steps, and goes on while it surprises.
        assert np.mean(run(0.01, 200)[-50:]) > 3.5

    def test_a_step_that_denies_a_trial_is_followed_by_another(self):
        """Drafts cost seven times as much at once; the trial shows it, but more than three times is not believed."""
        pacer = Pacer(PacingSettings(explore=10))
        drafts = chains([[0.9, 0.8, 0.7, 0.6]])

        def step(cost):
            kept = len(pacer.cut(drafts, 1).tokens)
            pacer.record(1, kept, 0.01 * (cost if kept else 1))
            return kept

        for _ in range(100):
            step(1.1)
        after = [step(7.0) for _ in range(120)]
        first = after.index(0)
        # From the first trial on, drafts are given up within some steps, and tried now and then.
        assert sum(n > 0 for n in after[first : first + 30]) < 6
        assert sum(n > 0 for n in after[first + 30 : first + 60]) < 6

    def test_where_drafts_are_always_odd_behind_a_trial_it_is_repeated_less_and_less_often(self):
        """A draft takes twice as long right behind a step without."""
        pacer = Pacer(PacingSettings(explore=10))
        pacer.spills = False
        drafts = chains([[0.9, 0.8, 0.7, 0.6]])
        kept = [1]
        for _ in range(2000):
            kept.append(len(pacer.cut(drafts, 1).tokens))
            pacer.record(1, kept[-1], 0.01 * (1 if not kept[-1] else 1.1 if kept[-2] else 2.2))
        assert kept[-1000:].count(0) < 60

    @pytest.mark.parametrize("spills", [True, False])
    def test_a_poor_draft_behind_a_trial_tells_nothing_of_it(self, spills):
        """The step behind the trial has no draft worth verifying, and takes three times as long."""
        pacer = Pacer(PacingSettings(explore=10))
        pacer.spills = spills
        good, poor = chains([[0.9, 0.8, 0.7, 0.6]]), chains([[0.02]])
        explored = 0
        for _ in range(40):
            before = pacer.explored
            kept = len(pacer.cut(good, 1).tokens)
            pacer.record(1, kept, 0.0105 if kept else 0.01)
            if pacer.explored > before and pacer.step_time.plain_steps > 3:
                explored = pacer.explored
                pacer.cut(poor, 1)
                pacer.record(1, 0, 0.03)
                break
        assert explored
        # Not at once another trial.
        assert len(pacer.cut(good, 1).tokens) > 0

    def test_batch_sizes_have_trials_of_their_own(self):
        """Eight sequences, for which drafts seemed too dear, get their trial though one is drafted for in between."""
        pacer = Pacer(PacingSettings(explore=30))

        def run(sequences, steps, price):
            tried = 0
            for _ in range(steps):
                cut = pacer.cut(chains([[0.9, 0.8]] * sequences), sequences)
                tokens = len(cut.tokens)
                pacer.record(sequences, tokens, 0.01 * (1 + price * tokens))
                tried += tokens > 0
            return tried

        run(1, 60, 0.01)
        run(8, 200, 1.0)
        assert run(8, 20, 1.0) <= 1
        # Now they are cheap, and come in short turns.
        verified = []
        for _ in range(30):
            run(1, 10, 0.01)
            verified.append(run(8, 10, 0.001))
        assert sum(verified[-5:]) > 40

    @pytest.mark.parametrize("resized", [False, True])
    def test_a_trial_that_nobody_measured_is_made_again_soon(self, resized):
        """A prompt comes, or the batch is another, whenever a draft is tried, so that nothing is learnt of it."""
        pacer = Pacer(PacingSettings(explore=200))
        for _ in range(40):
            cut = pacer.cut(chains([[0.9]]), 1)
            pacer.record(1, len(cut.tokens), 0.01 if not len(cut.tokens) else 0.05)
        tries = []
        for step in range(400):
            cut = pacer.cut(chains([[0.9]]), 1)
            if not len(cut.tokens):
                pacer.record(1, 0, 0.01)
                continue
            tries.append(step)
            if resized:
                pacer.cut(chains([[0.1]] * 4), 4)
        assert len(tries) >= 3
        # 8 steps later, then 16; in the end as rarely as any trial.
        assert np.diff(tries)[0] < 15
        assert np.diff(tries)[1] < 25
        assert len(tries) < 12

    def test_a_plain_trial_ends_though_its_batch_size_is_seen_for_one_step_only(self):
        """A row ends and another takes its place a step later: 8, 8, 7, 8, ..."""
        pacer = Pacer(PacingSettings(explore=40))
        plain = []
        for step in range(1200):
            sequences = 7 if step % 4 == 3 else 8
            cut = pacer.cut(chains([[0.9]] * sequences), sequences)
            pacer.record(sequences, len(cut.tokens), 0.01 * (1 + 0.02 * len(cut.tokens)))
            if sequences == 7:
                plain.append(not len(cut.tokens))
        assert sum(plain[-100:]) < 30

    def test_drafts_are_verified_even_where_no_step_can_be_measured(self):
        pacer = Pacer(PacingSettings(explore=20))
        lengths = [len(pacer.cut(chains([[0.9, 0.8]]), 1).tokens) for _ in range(40)]
        assert not any(lengths[:20])
        assert all(lengths[20:24])

    def test_one_to_many_sequences_and_back(self):
        """Many sequences fill the machine; the draft goes down with them, and comes back with the single one."""
        pacer = Pacer()

        def seconds(tokens):
            return 0.01 * max(1.0, tokens / 16)

        def run(sequences, steps):
            kept = []
            for _ in range(steps):
                cut = pacer.cut(chains([[0.7, 0.5, 0.35, 0.2]] * sequences), sequences)
                kept.append(len(cut.tokens) / sequences)
                pacer.record(sequences, len(cut.tokens), seconds(sequences + len(cut.tokens)))
            return np.mean(kept[-40:])

        assert run(1, 200) > 3.8
        assert run(32, 400) < 0.3
        assert run(1, 200) > 3.8


class TestTrees:
    """Two ways to go on, 0.5 each, the first with one token more behind it: 1.0 of two nodes, 0.95 of the chain."""

    TREE = Drafts(
        np.array([7, 9, 8], np.int32),
        np.array([-1, -1, 0], np.int32),
        np.array([0.5, 0.5, 0.45], np.float32),
        np.zeros(3, np.uint8),
        np.array([0, 3], np.int64),
    )

    @staticmethod
    def knowing(slope, mask, settings=None):
        pacer = told(slope, settings)
        pacer.step_time._parameters[TREE] = mask
        return pacer

    @pytest.mark.parametrize("padded", [False, True])
    @pytest.mark.parametrize(
        ("slope", "mask", "left"),
        [(0.05, 0.0, [7, 9, 8]), (0.05, 0.28, [7, 9, 8]), (0.05, 0.31, [7, 8]), (0.47, 0.0, [7, 9]), (0.6, 0.0, [])],
        ids=["the whole tree", "a mask below its worth", "a mask that is too dear", "dear tokens", "too dear tokens"],
    )
    def test_a_tree_only_where_it_beats_a_chain(self, slope, mask, left, padded):
        cut = self.knowing(slope, mask).cut(self.TREE, 1, padded=padded)
        assert cut.tokens.tolist() == left
        chain = cut.parents.tolist() == list(range(-1, len(left) - 1))
        assert chain == (len(left) < 2 or mask == 0.31)

    def test_where_no_chain_pays_the_tree_has_to_pay_for_its_mask(self):
        """Two nodes bring 0.015 beyond their price, one alone 0.0075."""
        settings = PacingSettings(margin=0.01)
        assert self.knowing(0.49, 0.0, settings).cut(self.TREE, 1).tokens.tolist() == [7, 9]
        assert self.knowing(0.49, 0.01, settings).cut(self.TREE, 1).tokens.tolist() == []

    @given(st.integers(0, 2**32 - 1), st.floats(0, 0.5), st.floats(0, 1), st.floats(1, 3), st.booleans())
    @settings(max_examples=80)
    def test_is_worth_what_the_best_of_the_rule_on_trees_and_on_chains_is(self, seed, slope, mask, gain, padded):
        source = np.random.default_rng(seed)
        rows = [grown(source, int(source.integers(0, 7))) for _ in range(int(source.integers(1, 4)))]
        drafts = drafters.of_nodes(rows)
        if not len(drafts.tokens):
            return
        best, *_ = choices(drafts, 1.0, len(rows), self.knowing(slope, mask).step_time, gain, padded)
        expected = naive.best_of_trees_and_chains(rows, len(rows), lambda n: 1 + slope * (n - 1), gain, mask, padded)
        assert best.surplus == pytest.approx(expected, abs=1e-5)
        assert any(best.kept)

    def test_either_shape_is_tried_now_and_then(self):
        for mask, usual in ((0.0, 3), (0.5, 2)):
            pacer = self.knowing(0.05, mask, PacingSettings(explore=10))
            left = [len(pacer.cut(self.TREE, 1).tokens) for _ in range(33)]
            # Steps without a draft are tried, too.
            verified = [n for n in left if n]
            assert verified.count(5 - usual) == len(verified) // 11
            assert verified.count(usual) == len(verified) - len(verified) // 11
            assert pacer.report()["trees"] == verified.count(3)
            # Two verified the other shape, the rest are steps without a draft.
            assert pacer.explored == 2 + left.count(0)
            assert pacer.decisions == {"verified": len(verified) - 2, "plain": 0, "explored": pacer.explored}

    def test_a_step_that_is_tried_for_two_reasons_counts_once(self):
        pacer = self.knowing(0.49, 0.0, PacingSettings(margin=0.05, explore=2))
        left = [len(pacer.cut(self.TREE, 1).tokens) for _ in range(12)]
        assert left == [0, 0, 2, 0, 0, 2, 0, 0, 1, 0, 0, 2]
        assert pacer.decisions == {"verified": 0, "plain": 8, "explored": 4}

    @pytest.mark.parametrize("mask", [0.1, 0.8])
    def test_finds_out_whether_trees_pay(self, mask):
        """All drafts are trees: what a tree costs could be taken for the cost of any draft. The first one is slow."""
        pacer, source, kept = Pacer(), np.random.default_rng(0), []
        for _ in range(1500):
            cut = pacer.cut(self.TREE, 1)
            tree = cut.parents.tolist() == [-1, -1, 0]
            seconds = 0.01 * (1 + 0.02 * len(cut.tokens) + mask * tree) * source.lognormal(0, 0.05)
            pacer.record(1, len(cut.tokens), seconds * (5 if tree and 3 not in kept else 1), tree)
            kept.append(len(cut.tokens))
        last = kept[-500:]
        # The tree brings 0.5 more than the chain.
        usual, other = (3, 2) if mask < 0.5 else (2, 3)
        assert last.count(usual) > 0.9 * len(last)
        assert last.count(other) < 0.05 * len(last)

    def test_what_is_uniform_is_verified_as_it_was_drafted(self):
        pacer = self.knowing(0.01, 0.6, PacingSettings(uniform=True))
        assert pacer.cut(self.TREE, 1, filled=4).tokens.tolist() == [7, 9, 8]
        pacer = self.knowing(0.01, 1.5, PacingSettings(uniform=True))
        assert pacer.cut(self.TREE, 1, filled=4).tokens.tolist() == []

    def test_steps_with_trees_teach_what_these_cost(self):
        pacer = Pacer()
        for _ in range(200):
            pacer.record(1, 0, 0.01)
            pacer.record(1, 0, 0.01)
            pacer.record(1, 3, 0.0109)
            pacer.record(1, 3, 0.0139, True)
        assert pacer.step_time.tree_price(1) == pytest.approx(0.3, abs=0.03)
        assert pacer.step_time.cost(1, 3) == pytest.approx(1.09, abs=0.03)
        assert pacer.report()["tree_ms"] == pytest.approx(3.0, abs=0.3)


class TestAccount:
    @given(st.integers(0, 2**32 - 1), st.booleans())
    @settings(max_examples=80)
    def test_counts_what_the_naive_account_does(self, seed, straight):
        source = np.random.default_rng(seed)
        rows = [grown(source, int(source.integers(0, 6))) for _ in range(int(source.integers(1, 5)))]
        if straight:
            falling_ones = [sorted((chance for _, chance in row), reverse=True) for row in rows]
            rows = [[(i - 1, chance) for i, chance in enumerate(row)] for row in falling_ones]
        last = [int(source.integers(-1, len(row))) for row in rows]
        drafts = drafters.of_nodes(rows)
        pacer = Pacer()
        pacer.judge(drafts.probability, drafts.offsets, np.array(last), drafts.parents)
        expected = naive.judged(rows, last)
        tokens, right, predicted = pacer.calibration.sum(axis=0)
        assert (tokens, right) == (len(expected), sum(hit for _, hit in expected))
        assert predicted == pytest.approx(sum(chance for chance, _ in expected), abs=1e-4)
        if straight:
            other = Pacer()
            other.judge(drafts.probability, drafts.offsets, np.array(last))
            assert (other.calibration == pacer.calibration).all()

    def test_of_a_tree_are_judged_the_nodes_behind_right_ones(self):
        pacer = Pacer()
        tree = (
            np.array([0.6, 0.3, 0.3, 0.15, 0.29], np.float32),
            np.array([0, 5]),
            np.array([2]),
            np.array([-1, -1, 0, 0, 1], np.int32),
        )
        pacer.judge(*tree)
        # Behind the committed text 0.6 right and 0.3 wrong; behind the first 0.5 right and 0.25 wrong; the last not.
        assert pacer.report()["calibration"] == [
            {"tokens": 1, "predicted": 0.25, "observed": 0.0},
            {"tokens": 1, "predicted": 0.3, "observed": 0.0},
            {"tokens": 1, "predicted": 0.5, "observed": 1.0},
            {"tokens": 1, "predicted": 0.6, "observed": 1.0},
        ]

    def test_judged_tokens_are_those_whose_ancestors_were_right(self):
        pacer = Pacer()
        probability = np.array([0.92, 0.46, 0.4, 0.25, 0.95], np.float32)
        pacer.judge(probability, np.array([0, 3, 3, 5]), np.array([0, -1, 1]))
        rows = pacer.report()["calibration"]
        # 0.92 right, then 0.46 / 0.92 wrong, the third not judged; 0.25 right, and 0.95 held to 1 of it.
        assert rows == [
            {"tokens": 1, "predicted": 0.25, "observed": 1.0},
            {"tokens": 1, "predicted": 0.5, "observed": 0.0},
            {"tokens": 2, "predicted": 0.96, "observed": 1.0},
        ]

    def test_probabilities_that_are_none_are_survived(self):
        pacer = Pacer()
        pacer.judge(np.array([np.nan, -1, 7], np.float32), np.array([0, 3]), np.array([2]))
        pacer.judge(np.array([np.inf, np.inf, np.nan, np.nan], np.float32), np.array([0, 4]), np.array([3]))
        assert [row["tokens"] for row in pacer.report()["calibration"]] == [4, 3]
        below = np.array([np.nan, 0.5, -np.inf, 0.2], np.float32)
        pacer.judge(below, np.array([0, 4]), np.array([3]))
        pacer.judge(below, np.array([0, 4]), np.array([0]), np.array([-1, 0, 0, 0], np.int32))
        assert sum(row["tokens"] for row in pacer.report()["calibration"]) == 15

    def test_the_report_is_plain_data(self):
        pacer = taught(0.1)
        pacer.cut(chains([[0.9, 0.8, 0.01]]), 1)
        pacer.judge(np.array([0.9, 0.8], np.float32), np.array([0, 2]), np.array([0]))
        report = json.loads(json.dumps(pacer.report()))
        assert (report["steps"], report["verified"], report["explored"]) == (1, 1, 0)
        assert (report["drafted"], report["kept"]) == (3, 2)
        assert report["step_ms"]["1"] == pytest.approx(10, rel=0.05)
        assert sum(row["tokens"] for row in report["calibration"]) == 2


class TestConfiguration:
    def test_fusion_is_paced_and_others_only_if_asked_for(self):
        calibrated, other = (
            make_drafter("fusion", {"memory": "1MiB"}),
            make_drafter("prompt_lookup", {"memory": "1MiB"}),
        )
        assert pacer_for(calibrated, {}) is not None
        assert pacer_for(other, {}) is None
        assert pacer_for(other, {"margin": 0.1}) is not None
        assert pacer_for(other, {"enabled": True}) is not None
        assert pacer_for(calibrated, {"enabled": False, "margin": 0.1}) is None

    @pytest.mark.parametrize("given", [False, "off"])
    def test_off_in_short(self, given):
        assert parse_config({"pacing": given}).sections["pacing"] == {"enabled": False}

    @pytest.mark.parametrize("given", [True, "on"])
    def test_on_in_short(self, given):
        assert parse_config({"pacing": given}).sections["pacing"] == {"enabled": True}

    def test_off_in_yaml(self, tmp_path):
        path = tmp_path / "config.yaml"
        path.write_text("drafter: fusion\npacing: off\n", encoding="utf-8")
        assert parse_config(path).sections["pacing"] == {"enabled": False}

    @pytest.mark.parametrize("bad", [{"margins": 0.1}, {"margin": 2}, {"explore": 1}, {"prior_slope": -1}])
    def test_bad_settings(self, bad):
        with pytest.raises(ConfigError, match="pacing: "):
            pacer_for(None, bad)

    @pytest.mark.parametrize("bad", ["fast", 3, [1]])
    def test_bad_sections(self, bad):
        with pytest.raises(ConfigError, match="pacing: expected a mapping"):
            parse_config({"pacing": bad})
