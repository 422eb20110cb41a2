"""The time of a step by the tokens in its forward pass, T(n), learnt from the steps that are taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from freedraft.retrieval.jit import kernel
from freedraft.retrieval.ragged import Float64, Int64

# The numbers of tokens for which T is kept; in between it is interpolated, beyond the last it grows in proportion.
_GRID = [*range(1, 17), *range(20, 33, 4), *range(40, 65, 8), *range(80, 129, 16), 192, 256, 384, 512, 768]
GRID: Int64 = np.array([*_GRID, 1024, 1536, 2048, 4096, 8192, 16384], np.int64)


class StepTime:
    """T(n), learnt from the steps that were taken.

    T is kept as a shape, T(n) / T(1), which changes slowly, times a scale, which follows the growing context and the
    load of the machine. The scale learns from every step. The shape learns only from the first steps of a size in a
    row, set against the latest few: one more that is slower than those before it tells of the machine, not of its
    place. A place's first samples count by their median, and later ones no more than twice or half what is expected, so
    that a stray one does little, and a change of load is followed within some ten steps all the same. What was measured
    long ago weighs less than what is measured now. The shape used is the closest one that never falls (pool adjacent
    violators; Ayer et al. 1955).

    Attributes:
        told: it was not measured, and never is.
        shape: float64 `(len(GRID),)`, T(n) / T(1), monotone.
        scale: seconds of a step of one token; 0 before the first sample.
        samples: int64 `(len(GRID),)`, steps seen near each n.
    """

    FIRST = 5
    """Samples that count by their median."""
    FADE = 0.995
    """By this the weight of all that was measured falls at every step."""
    MEMORY = 50.0
    """No place weighs more samples than this."""
    SCALE_RATE = 0.2
    FIRST_MOST = 3.0
    """A place's first samples count at most as so many times what is expected: what seems too dear is not soon tried
    again."""
    FADED = 0.05
    """A place of less weight counts as never measured."""
    LATELY = 5
    """Steps that tell the machine's speed of just now."""
    TELLING = 2
    """Steps of one size in a row of which the shape learns."""
    STALE = 2.0

    told = False

    def __init__(self, prior_slope: float) -> None:
        self._prior: Float64 = 1.0 + prior_slope * (GRID - 1).astype(np.float64)
        self._raw: Float64 = self._prior.copy()
        self._weight: Float64 = np.zeros(len(GRID))
        # The first samples of a place, each as a multiple of the scale of its time.
        self._first: list[list[float]] = [[] for _ in GRID]
        self._lately: list[float] = []
        self._last = -1
        self._run = 0
        self._first_scales: list[float] = []
        self._scale_then: Float64 = np.zeros(len(GRID))
        self.shape: Float64 = self._prior.copy()
        self.scale = 0.0
        self.samples: Int64 = np.zeros(len(GRID), np.int64)

    def record(self, tokens: int, seconds: float) -> float:
        """Take in one step: `tokens` in its forward pass, `seconds` from end to end. Nonsense is left out.

        Returns:
            How long the step took, as a multiple of what was expected.
        """
        if tokens < 1 or not 0 < seconds < float("inf"):
            return 1.0
        at = nearest(GRID, tokens)
        if self._weight[at] < self.FADED or self.stale(tokens):
            self._first[at] = []
            self.samples[at] = 0
        shape = self.shape_at(tokens)
        if len(self._first_scales) < self.FIRST:
            self._first_scales.append(seconds / shape)
            self.scale = median(self._first_scales)
        lately = median(self._lately) if self._lately else self.scale
        self._learn(at, seconds / lately, shape)
        if self.samples[at] > self.FIRST:
            self.scale *= 1.0 + self.SCALE_RATE * (min(max(seconds / (self.scale * shape), 0.5), 2.0) - 1.0)
        if self.samples[at] >= self.FIRST:
            self._lately = [*self._lately[1 - self.LATELY :], seconds / shape]
        self._scale_then[at] = self.scale
        self._fit()
        return seconds / (lately * shape)

    def _learn(self, at: int, time: float, shape: float) -> None:
        """Take in, at a place, `time` as a multiple of a step of one token's at the machine's speed of just now."""
        self._run = self._run + 1 if at == self._last else 1
        self._last = at
        telling = self._run <= self.TELLING
        self._weight *= self.FADE
        self.samples[at] += 1
        first = self.samples[at] <= self.FIRST
        if first or telling:
            self._weight[at] = min(self._weight[at] + 1.0, self.MEMORY)
        before, surprise = self._raw[at], self.samples[at] > 1 and time < shape / 1.5
        if first:
            # The median would believe it late.
            earlier = [] if surprise else self._first[at]
            self._first[at] = [*earlier, min(time, self.FIRST_MOST * shape)]
            self._raw[at] = median(self._first[at])
        elif telling:
            most = 4.0 if self._weight[at] < self.FIRST else 1.5
            self._raw[at] *= 1.0 + (min(max(time / shape, 1 / most), most) - 1.0) / self._weight[at]
        if surprise and self._raw[at] < before and before > 1.0:
            # So much cheaper than thought that what costs more will be cheaper, too.
            share = max(self._raw[at] - 1.0, 0.0) / (before - 1.0)
            self._raw[at + 1 :] = 1.0 + (self._raw[at + 1 :] - 1.0) * share
        # Seen now, if not compared.
        self._weight[at] = max(self._weight[at], 1.0)

    def _fit(self) -> None:
        """Make the shape from what was measured, 1 for one token, and all that is relative to it."""
        known = np.where(self._weight < self.FADED, 0, self.samples)
        first = fit_monotone(self._raw, self._weight, known, self._prior, self.shape)
        if first == 1.0:
            return
        self._raw /= first
        self.scale *= first
        self._scale_then *= first
        self._first = [[one / first for one in samples] for samples in self._first]
        self._lately = [one * first for one in self._lately]

    def stale(self, tokens: int) -> bool:
        """Whether the load has changed so much since T(tokens) was measured that it says little."""
        return is_stale(self._scale_then[nearest(GRID, tokens)], self.scale, self.STALE)

    @classmethod
    def known(cls, curve: Callable[[int], float]) -> StepTime:
        """A T(n) that is told, in seconds, and not measured: samples change nothing."""
        time = _Known(0.0)
        time.scale = curve(1)
        time.shape = np.maximum.accumulate([curve(int(n)) / time.scale for n in GRID])
        time.samples[:] = 2**31
        return time

    def shape_at(self, tokens: int) -> float:
        """T(tokens) / T(1)."""
        return float(interpolate(GRID, self.shape, tokens))

    def samples_at(self, tokens: int) -> int:
        """Steps seen near `tokens`, under about the load of now.

        Near is up to a fifth more or less: where sequences come and go, a step of one size may never be seen alone.
        """
        return samples_near(GRID, self.samples, self._scale_then, self.scale, self.STALE, tokens)

    def least_slope(self, tokens: int, more: int) -> float:
        """The least that T rises by a token, as a share of T(1), from `tokens` on to `more` of them more."""
        return least_slope(GRID, self.shape, tokens, tokens + more)

    def table(self) -> dict[int, float]:
        """T(n) in seconds, for the n that were measured."""
        return {
            int(n): self.scale * float(shape)
            for n, shape, samples in zip(GRID, self.shape, self.samples, strict=True)
            if samples
        }


class _Known(StepTime):
    told = True

    def record(self, tokens: int, seconds: float) -> float:
        return 1.0


def median(values: Sequence[float]) -> float:
    """The median of a few numbers; numpy's takes longer."""
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


@kernel
def nearest(grid: Int64, tokens: int) -> int:
    """The place of the grid whose ratio to `tokens` is nearest to one."""
    at = 0
    while at + 1 < len(grid) and grid[at] * grid[at + 1] < tokens * tokens:
        at += 1
    return at


@kernel
def is_stale(then: float, scale: float, stale: float) -> bool:
    """Whether a place was measured, at a scale `then` that is not the one of now by the factor `stale`."""
    return then > 0.0 and (scale >= stale * then or scale * stale <= then)


@kernel
def samples_near(grid: Int64, samples: Int64, then: Float64, scale: float, stale: float, tokens: int) -> int:
    """The samples, not stale, of all places within a fifth of the one for `tokens`."""
    middle = grid[nearest(grid, tokens)]
    total = 0
    for i in range(len(grid)):
        if 5 * max(grid[i], middle) <= 6 * min(grid[i], middle) and not is_stale(then[i], scale, stale):
            total += samples[i]
    return total


@kernel
def least_slope(grid: Int64, shape: Float64, first: int, last: int) -> float:
    """The least slope of `shape` between two places of the grid next to each other, from `first` to `last` tokens."""
    least = np.inf
    for i in range(len(grid) - 1):
        if grid[i + 1] > first and grid[i] < last:
            least = min(least, (shape[i + 1] - shape[i]) / (grid[i + 1] - grid[i]))
    return least


@kernel
def interpolate(grid: Int64, shape: Float64, tokens: int) -> float:
    """T(tokens) / T(1): linear between grid points, in proportion beyond the last."""
    last = len(grid) - 1
    if tokens >= grid[last]:
        return shape[last] * tokens / grid[last]
    at = 0
    while grid[at + 1] <= tokens:
        at += 1
    share = (tokens - grid[at]) / (grid[at + 1] - grid[at])
    return shape[at] + share * (shape[at + 1] - shape[at])


@kernel
def fit_monotone(raw: Float64, weight: Float64, samples: Int64, prior: Float64, shape: Float64) -> float:
    """Write the non-falling fit of `raw` to `shape`, 1 at its first place; return what it was there before.

    Points that were never measured say nothing: they take the value that the measured ones around them give, and
    beyond those the prior's slope.
    """
    # Pools of adjacent points with one mean each.
    means = np.empty(len(raw))
    weights = np.empty(len(raw))
    ends = np.empty(len(raw), np.int64)
    pools = 0
    for i in range(len(raw)):
        if samples[i] == 0:
            continue
        means[pools], weights[pools], ends[pools] = raw[i], max(weight[i], 1e-3), i
        pools += 1
        while pools > 1 and means[pools - 2] > means[pools - 1]:
            both = weights[pools - 2] + weights[pools - 1]
            means[pools - 2] = (means[pools - 2] * weights[pools - 2] + means[pools - 1] * weights[pools - 1]) / both
            weights[pools - 2] = both
            ends[pools - 2] = ends[pools - 1]
            pools -= 1
    if pools == 0:
        shape[:] = prior
        return 1.0
    pool = 0
    for i in range(len(raw)):
        if samples[i] == 0:
            continue
        while i > ends[pool]:
            pool += 1
        shape[i] = means[pool]
    # The unmeasured: between neighbours in proportion to the prior's rise, outside by the prior's ratio.
    left = -1
    for i in range(len(raw)):
        if samples[i] > 0:
            left = i
            continue
        right = i
        while right < len(raw) and samples[right] == 0:
            right += 1
        if left >= 0 and right < len(raw):
            rise = max(prior[right] - prior[left], 1e-9)
            shape[i] = shape[left] + (shape[right] - shape[left]) * (prior[i] - prior[left]) / rise
        elif left >= 0:
            shape[i] = shape[left] * prior[i] / prior[left]
        else:
            shape[i] = shape[right] * prior[i] / prior[right] if right < len(raw) else prior[i]
    first = shape[0]
    for i in range(len(raw)):
        shape[i] /= first
    return first
