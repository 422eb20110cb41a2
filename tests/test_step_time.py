"""T(n) on made-up clocks, and the fit that never falls. No clock is read here."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from freedraft.plugins.step_time import GRID, StepTime, fit_monotone, interpolate


def flat(slope):
    return 1.0 + slope * (GRID - 1)


class TestStepTime:
    @given(st.lists(st.tuples(st.integers(1, 20000), st.floats(1e-6, 1e3)), max_size=40))
    @settings(max_examples=100)
    def test_never_falls(self, steps):
        time = StepTime(0.03)
        for tokens, seconds in steps:
            time.record(tokens, seconds)
        assert (np.diff(time.shape) >= -1e-12).all()
        assert time.shape[0] == 1
        assert np.isfinite(time.shape).all()
        values = [time.shape_at(n) for n in range(1, 30)]
        assert values == sorted(values)
        assert all(np.isfinite(value) for value in time.table().values())

    def test_learns_a_curve(self):
        time = StepTime(0.03)
        source = np.random.default_rng(0)
        for _ in range(1500):
            n = int(source.integers(1, 33))
            time.record(n, 0.02 * max(1.0, n / 8) * source.lognormal(0, 0.1))
        for n in (1, 4, 8, 16, 32):
            assert time.shape_at(n) == pytest.approx(max(1.0, n / 8), rel=0.15)
            assert time.table()[n] == pytest.approx(0.02 * max(1.0, n / 8), rel=0.2)

    def test_a_step_of_the_curve(self):
        """On a CPU 2 to 16 tokens cost 1.7 times one."""
        time = StepTime(0.03)
        for _ in range(20):
            for n in (1, 2, 5, 9, 16):
                time.record(n, 0.05 * (1.7 if n > 1 else 1.0))
        assert [time.shape_at(n) for n in (1, 2, 3, 12, 16)] == pytest.approx([1, 1.7, 1.7, 1.7, 1.7], rel=0.01)

    def test_is_robust_to_outliers(self):
        time = StepTime(0.03)
        source = np.random.default_rng(0)
        for i in range(600):
            n = int(source.choice([1, 4, 8]))
            slow = 50 if i % 37 == 5 else 1
            time.record(n, 0.01 * (1 + 0.1 * (n - 1)) * slow)
        assert time.shape_at(4) == pytest.approx(1.3, rel=0.15)
        assert time.shape_at(8) == pytest.approx(1.7, rel=0.15)
        assert time.scale == pytest.approx(0.01, rel=0.3)

    @pytest.mark.parametrize("seed", range(5))
    def test_the_shape_outlives_a_machine_that_changes_its_speed(self, seed):
        """Other programs come and go every few seconds; steps without a draft are many, those with one few."""
        time = StepTime(0.03)
        source = np.random.default_rng(seed)
        load = 1.0
        for step in range(1500):
            if step % 40 == 0:
                load = float(source.choice([1.0, 1.5, 3.0]))
            n = int(source.integers(3, 8)) if source.random() < 0.15 else 1
            time.record(n, 0.05 * load * (1.7 if n > 1 else 1.0) * source.lognormal(0, 0.08))
        for n in (3, 5, 7):
            assert time.shape_at(n) == pytest.approx(1.7, rel=0.15)

    @pytest.mark.parametrize("first", [0, 3])
    def test_a_slow_beginning_is_soon_forgotten(self, first):
        """A kernel that is compiled, a cache that is filled: one step of a hundred times the cost."""
        time = StepTime(0.03)
        for i in range(12):
            time.record(1 if i < 6 else 4, 1.0 if i == first or i == first + 6 else 0.01)
        assert time.scale == pytest.approx(0.01, rel=0.25)
        assert time.shape_at(4) == pytest.approx(1.0, rel=0.25)

    def test_the_scale_follows_the_load(self):
        time = StepTime(0.03)
        for load in (1.0, 4.0, 1.0):
            for _ in range(60):
                for n in (1, 4):
                    time.record(n, 0.01 * load * (1 + 0.2 * (n - 1)))
            assert time.scale == pytest.approx(0.01 * load, rel=0.1)
            assert time.shape_at(4) == pytest.approx(1.6, rel=0.1)

    def test_samples_of_about_as_many_tokens_count(self):
        time = StepTime(0.03)
        for n in (1, 10) * 30:
            time.record(n, 0.01 * n)
        seen = time.samples_at(10)
        assert seen > 20
        assert [time.samples_at(n) for n in (2, 8, 9, 11, 13)] == [0, 0, seen, seen, 0]
        for _ in range(60):
            time.record(1, 0.03)
        assert time.stale(10)
        assert time.samples_at(11) == 0

    @pytest.mark.parametrize(
        ("tokens", "seconds"), [(0, 1.0), (-3, 1.0), (1, 0.0), (1, -1.0), (1, np.inf), (1, np.nan)]
    )
    def test_nonsense_is_left_out(self, tokens, seconds):
        time = StepTime(0.03)
        time.record(tokens, seconds)
        assert not time.samples.any()
        assert time.scale == 0

    @given(st.lists(st.tuples(st.floats(0.1, 10), st.integers(0, 3)), min_size=6, max_size=6))
    def test_the_fit_is_the_closest_that_never_falls(self, points):
        scipy = pytest.importorskip("scipy.optimize", reason="a check against scipy's isotonic regression")
        raw, samples = np.array([p[0] for p in points]), np.array([p[1] for p in points])
        if samples[0] == 0 or not hasattr(scipy, "isotonic_regression"):
            return
        fitted, prior = np.empty(6), flat(0.1)[:6]
        fit_monotone(raw, samples.astype(float), samples, prior, fitted)
        measured = samples > 0
        expected = scipy.isotonic_regression(raw[measured], weights=samples[measured]).x
        assert fitted[measured] == pytest.approx(expected / expected[0])

    def test_the_unmeasured_follow_the_prior(self):
        prior, fitted = flat(0.1)[:6], np.empty(6)
        samples = np.array([1, 0, 0, 5, 0, 0])
        fit_monotone(np.array([1.0, 9, 9, 2.5, 9, 9]), samples.astype(float), samples, prior, fitted)
        assert fitted == pytest.approx([1, 1.5, 2, 2.5, 2.5 * 1.4 / 1.3, 2.5 * 1.5 / 1.3])
        nothing = np.zeros(6, np.int64)
        fit_monotone(prior, nothing.astype(float), nothing, prior, fitted)
        assert fitted == pytest.approx(prior)

    def test_interpolation_and_what_lies_beyond(self):
        shape = flat(0.01)
        for n in (1, 2, 17, 18, 35, 200, 16384):
            assert interpolate(GRID, shape, n) == pytest.approx(1 + 0.01 * (n - 1))
        assert interpolate(GRID, shape, 32768) == pytest.approx(2 * shape[-1])
