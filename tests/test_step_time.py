"""What a step is learnt to cost, on made-up clocks. No clock is read here."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from freedraft.plugins.step_time import FEATURES, GRID, StepTime, features_of, interpolate, knots_of, solve

DRAFTED = (0, 0, 0, 1, 2, 2, 3, 3, 4, 5, 8, 12)


def teach(time, cost, steps, source, noise=0.1, sequences=1, pick=DRAFTED, load=lambda step: 1.0):
    """Let `time` see steps of 0.05 s x `cost` with noise and a load that comes and goes."""
    for step in range(steps):
        drafted = sequences * int(source.choice(pick))
        seconds = 0.05 * cost(drafted) * load(step) * source.lognormal(0, noise)
        time.record(sequences, drafted, seconds)


def busy(source, loads=(1.0, 1.5, 2.5), every=40):
    """A load that changes every so many steps."""
    now = {}
    return lambda step: now.setdefault(step // every, float(source.choice(loads)))


class TestStepTime:
    @given(
        st.lists(st.tuples(st.integers(0, 63), st.integers(0, 9000), st.floats(1e-6, 1e3)), max_size=40),
        st.sampled_from([1, 2, 8, 64]),
    )
    @settings(max_examples=100)
    def test_never_falls_and_is_convex(self, steps, least):
        time = StepTime(0.03, least)
        for more, drafted, seconds in steps:
            time.record(least + more % least, drafted, seconds, drafted % 2 == 1)
        plain, grid, shape = time.knots(least)
        assert plain == pytest.approx(1)
        assert np.isfinite(shape).all()
        assert shape[0] >= plain - 1e-9
        slopes = np.diff(shape) / np.diff(grid)
        assert (slopes >= -1e-9).all()
        assert (np.diff(slopes) >= -1e-6 * (1 + slopes[1:])).all()
        for more in (1, 5, 1000):
            within = slopes[grid[:-1] < least + more]
            assert time.least_slope(least, more) == pytest.approx(within.min() / plain, rel=1e-6, abs=1e-9)
        assert time.knots(2 * least)[0] >= plain
        assert all(np.isfinite(value) for value in time.table().values())

    @pytest.mark.parametrize("loaded", [False, True])
    @pytest.mark.parametrize(
        ("sequences", "cost"),
        [
            (1, lambda d: 1 + 0.06 * d),
            (1, lambda d: 1.62 + 0.03 * d if d else 1.0),  # one token alone runs on another kernel
            (1, lambda d: 1 + 0.002 * d),
            (4, lambda d: 1 + 0.03 * d),
            (1, lambda d: 1 + 0.15 * max(0, d - 3)),
        ],
        ids=["line", "jump", "flat", "rows", "bend"],
    )
    def test_learns_a_curve_on_a_machine_that_changes_its_speed(self, sequences, cost, loaded):
        wrong = []
        for seed in range(4):
            time, source = StepTime(0.03, sequences), np.random.default_rng(seed)
            teach(time, cost, 600, source, sequences=sequences, load=busy(source) if loaded else lambda step: 1.0)
            drafted = [sequences * d for d in (1, 2, 4, 8, 12)]
            wrong += [time.cost(sequences, d) / cost(d) - 1 for d in drafted]
        assert np.sqrt(np.mean(np.square(wrong))) < 0.06

    def test_exact_times_are_learnt_exactly(self):
        time = StepTime(0.03)
        for _ in range(200):
            for d in (0, 1, 2, 5, 9):
                time.record(1, d, 0.05 * (1.3 + 0.1 * d if d else 1.0))
        for d in (1, 2, 3, 9, 12):
            assert time.cost(1, d) == pytest.approx(1.3 + 0.1 * d, rel=0.02)
        assert time.table()[1] == pytest.approx(0.05, rel=0.02)
        assert time.table()[10] == pytest.approx(0.05 * 2.2, rel=0.02)
        assert max(time.table()) == 10

    def test_rows_and_draft_tokens_are_told_apart(self):
        """Sequences come and go, from 8 to 15: a step of twelve tokens may have four of them drafted, or none."""
        time, source = StepTime(0.03, 8), np.random.default_rng(0)
        for _ in range(800):
            sequences, drafted = int(source.integers(8, 16)), int(source.choice([0, 0, 1, 3, 4, 8, 16]))
            time.record(sequences, drafted, 0.01 * (50 + 4 * sequences + 2.7 * drafted) * source.lognormal(0, 0.1))
        for sequences, drafted in ((8, 4), (8, 16), (12, 8), (15, 1)):
            expected = 1 + 2.7 * drafted / (50 + 4 * sequences)
            assert time.cost(sequences, drafted) == pytest.approx(expected, rel=0.06)

    @pytest.mark.parametrize("mask", [0.0, 0.15, 0.6])
    def test_what_a_draft_that_branches_costs_is_told_from_its_tokens(self, mask):
        """Trees have more tokens than chains, so that a tree's own cost could be taken for that of its tokens."""
        time, source = StepTime(0.03), np.random.default_rng(1)
        for _ in range(600):
            branched = bool(source.integers(2))
            drafted = int(source.choice([4, 8, 12] if branched else [0, 0, 2, 4, 8]))
            time.record(1, drafted, 0.05 * (1 + 0.04 * drafted + mask * branched) * source.lognormal(0, 0.1), branched)
        assert time.tree_price(1) == pytest.approx(mask, abs=0.05)
        assert time.cost(1, 8) == pytest.approx(1.32, rel=0.05)

    def test_a_dear_tree_is_forgotten_when_none_is_seen(self):
        time, source = StepTime(0.03), np.random.default_rng(1)
        for _ in range(100):
            time.record(1, 4, 0.1 * source.lognormal(0, 0.1), True)
            time.record(1, 0, 0.05 * source.lognormal(0, 0.1))
            time.record(1, 4, 0.06 * source.lognormal(0, 0.1))
        assert time.tree_price(1) > 0.5
        teach(time, lambda d: 1 + 0.05 * d, 3000, source)
        assert time.tree_price(1) < 0.1

    def test_is_robust_to_outliers(self):
        time, source = StepTime(0.03), np.random.default_rng(0)
        strays = set(source.choice(600, 20, replace=False).tolist())
        teach(time, lambda d: 1 + 0.1 * d, 600, source, load=lambda step: 50 if step in strays else 1)
        assert time.cost(1, 3) == pytest.approx(1.3, rel=0.1)
        assert time.cost(1, 8) == pytest.approx(1.8, rel=0.1)
        assert time.speed == pytest.approx(0.05, rel=0.3)

    def test_the_noisier_the_steps_the_more_the_prior_counts(self):
        """Of drafts that seem to cost nothing."""
        foreseen = []
        for noise in (1.0, 1.1, 1.3):
            time = StepTime(0.03, 8)
            for i in range(42):
                time.record(8, 0, 0.07 * noise ** (i % 3 - 1))
            for drafted in (8, 9, 8, 9):
                time.record(8, drafted, 0.07)
            foreseen.append(time.cost(8, 8))
        quiet, noisy, noisiest = foreseen
        assert 1.0 <= quiet < noisy < noisiest <= StepTime(0.03, 8).cost(8, 8)

    def test_a_poor_draft_that_was_lucky_is_not_free(self):
        """Each number of tokens was seen a few times only; the one that went fast by chance does not stand out."""
        time, source = StepTime(0.03), np.random.default_rng(3)
        teach(time, lambda d: 1 + 0.06 * d, 150, source, noise=0.15)
        slopes = np.diff([time.cost(1, d) for d in range(13)])
        assert (slopes > 0.02).all()

    @pytest.mark.parametrize("first", [0, 3])
    def test_a_slow_beginning_is_soon_forgotten(self, first):
        """A kernel that is compiled, a cache that is filled: one step of a hundred times the cost."""
        time = StepTime(0.03)
        for i in range(40):
            time.record(1, 3 * (i % 2), 1.0 if i in (first, first + 1) else 0.01)
        assert time.speed == pytest.approx(0.01, rel=0.25)
        assert time.cost(1, 3) == pytest.approx(1.0, rel=0.25)

    def test_the_speed_follows_the_load(self):
        time = StepTime(0.03)
        for load in (1.0, 4.0, 1.0):
            for _ in range(60):
                for d in (0, 3):
                    time.record(1, d, 0.01 * load * (1 + 0.2 * d))
            assert time.speed == pytest.approx(0.01 * load, rel=0.1)
            assert time.cost(1, 3) == pytest.approx(1.6, rel=0.1)

    def test_a_change_of_the_shape_is_soon_believed(self):
        time = StepTime(0.03)
        for cost, steps in ((1.05, 100), (6.0, 16), (1.05, 40)):
            for step in range(steps):
                time.record(1, 4 * (step % 2), 0.01 * (cost if step % 2 else 1.0))
            assert time.cost(1, 4) == pytest.approx(cost, rel=0.5)

    @pytest.mark.parametrize(
        ("sequences", "drafted", "seconds"),
        [(0, 1, 1.0), (-3, 1, 1.0), (1, -1, 1.0), (1, 1, 0.0), (1, 1, -1.0), (1, 1, np.inf), (1, 1, np.nan)],
    )
    def test_nonsense_is_left_out(self, sequences, drafted, seconds):
        time = StepTime(0.03)
        assert time.record(sequences, drafted, seconds) == 1.0
        assert time.plain_steps == time.draft_steps == time.speed == 0
        assert time.table() == {}

    def test_a_batch_that_is_too_small_is_left_out(self):
        time = StepTime(0.03, 8)
        assert time.record(7, 0, 1.0) == 1.0
        assert time.plain_steps == 0

    @given(st.integers(0, 2**32 - 1), st.integers(0, 7), st.integers(0, 200))
    def test_a_step_is_foreseen_as_it_is_learnt(self, seed, more, drafted):
        parameters = np.array([1.0, *np.random.default_rng(seed).uniform(0, 5, FEATURES - 1)])
        plain, grid, shape = knots_of(parameters, 8, 8 + more)
        foreseen = interpolate(grid, shape, 8 + more + drafted) if drafted else plain
        assert foreseen == pytest.approx(features_of(8 + more, drafted, False, 8) @ parameters)

    def test_the_table_is_of_the_latest_batch_size(self):
        time = StepTime(0.03, 8)
        for sequences, drafted in ((15, 0), (8, 3), (8, 0)) * 9:
            time.record(sequences, drafted, 0.01)
        assert sorted(time.table()) == [8, 9, 10, 11]

    def test_before_anything_was_measured_a_token_costs_what_the_prior_says(self):
        assert StepTime(0.03).cost(1, 10) == pytest.approx(1.3)
        # T(n) = 1 + 0.03 (n - 1) once more, from 16 tokens on.
        assert StepTime(0.03, 16).cost(16, 10) == pytest.approx(1.75 / 1.45)

    @given(st.integers(0, 2**32 - 1))
    @settings(max_examples=30)
    def test_the_solver_finds_the_least_squares_that_are_nowhere_negative(self, seed):
        optimize = pytest.importorskip("scipy.optimize", reason="a check against scipy's solver")
        source = np.random.default_rng(seed)
        count = FEATURES
        steps = zip(source.integers(1, 3, 60), source.integers(0, 40, 60), source.integers(0, 2, 60), strict=True)
        rows = np.array([features_of(sequences, drafted, bool(tree), 1) for sequences, drafted, tree in steps])
        values = rows @ source.normal(0.3, 1, count) + source.normal(0, 0.1, 60)
        trust, prior = source.uniform(0.1, 2, count), source.uniform(0, 1, count)
        found = np.ones(count)
        for _ in range(1000):
            solve(rows.T @ rows, rows.T @ values, trust, prior, found)
        weak = np.sqrt(trust)
        whole, told = np.concatenate([rows, np.diag(weak)]), np.concatenate([values, weak * prior])
        _, least = optimize.nnls(whole, told)
        assert (found >= 0).all()
        # It is slow to the very minimum where parameters stand for one another; what counts is the fit.
        assert np.linalg.norm(whole @ found - told) < 1.001 * least


class TestKnown:
    def test_is_what_it_is_told(self):
        time = StepTime.known(lambda n: 2 * max(1.0, n / 64))
        assert time.told
        assert time.cost(1, 63) == 1
        assert time.cost(64, 64) == pytest.approx(2)
        assert time.least_slope(1, 24) == 0
        assert time.least_slope(128, 512) == pytest.approx(1 / 128)
        time.record(1, 5, 100.0)
        assert time.cost(1, 63) == 1
        assert time.table()[1] == time.table()[64] == 2
        assert time.table()[128] == pytest.approx(4)

    def test_interpolation_and_what_lies_beyond(self):
        shape = 1.0 + 0.01 * (GRID - 1)
        for n in (1, 2, 17, 18, 35, 200, 16384):
            assert interpolate(GRID, shape, n) == pytest.approx(1 + 0.01 * (n - 1))
        assert interpolate(GRID, shape, 32768) == pytest.approx(2 * shape[-1])
