"""Pacing: how many of the drafted tokens are worth verifying now.

One rule, for one sequence or hundreds. Let T(n) be the time of a step whose forward pass takes n tokens, and p the
probabilities of all drafted tokens of all sequences, likeliest first. Verify the first k, for the k that maximises

    (sequences + p[0] + ... + p[k-1]) / T(sequences + k)

that is, expected committed tokens a second. A token's probability includes its ancestors', so the likeliest first are
always whole beginnings of drafts. T is measured while running; where nothing pays, k is 0.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from pydantic import Field

from freedraft.plugins.base import Drafts
from freedraft.plugins.config import Settings
from freedraft.retrieval.jit import kernel
from freedraft.retrieval.ragged import Float32, Float64, Int64

# The numbers of tokens for which T is kept; in between it is interpolated, beyond the last it grows in proportion.
_GRID = [*range(1, 17), *range(20, 33, 4), *range(40, 65, 8), *range(80, 129, 16), 192, 256, 384, 512, 768]
GRID: Int64 = np.array([*_GRID, 1024, 1536, 2048, 4096, 8192, 16384], np.int64)

CALIBRATION_BUCKETS = 10


class PacingSettings(Settings):
    """Settings of the section `pacing`; `pacing: off` in short."""

    enabled: bool | None = Field(
        None,
        description="Whether to pace drafts; by default only those of `fusion`, whose probabilities are calibrated.",
    )
    margin: float = Field(
        0.02, ge=0, le=1, description="Draft only where the expected gain in tokens a second is above this share."
    )
    explore: int = Field(
        100,
        ge=2,
        description="After so many steps in a row that all verified a draft, or all none though there was one, try the "
        "other once: T of both has to be known, and changes.",
    )
    prior_slope: float = Field(
        0.03, ge=0, description="What one more token is taken to cost, as a share of a step, until that is measured."
    )


class StepTime:
    """T(n), learnt from the steps that were taken.

    T is kept as a shape, T(n) / T(1), which changes slowly, times a scale, which follows the growing context and the
    load of the machine. Samples count no more than twice or half what is expected, so that a stray one does little, and
    a change of load is followed within some twenty steps all the same. The shape used is the closest one that never
    falls (pool adjacent violators; Ayer et al. 1955).

    Attributes:
        shape: float64 `(len(GRID),)`, T(n) / T(1), monotone.
        scale: seconds of a step of one token; 0 before the first sample.
        samples: int64 `(len(GRID),)`, steps seen near each n.
    """

    MEMORY = 50.0
    PRIOR_WEIGHT = 0.5
    SCALE_RATE = 0.1

    def __init__(self, prior_slope: float) -> None:
        self._log_grid = np.log(GRID)
        self._prior: Float64 = 1.0 + prior_slope * (GRID - 1).astype(np.float64)
        self._raw: Float64 = self._prior.copy()
        self._weight: Float64 = np.full(len(GRID), self.PRIOR_WEIGHT)
        self.shape: Float64 = self._prior.copy()
        self.scale = 0.0
        self.samples: Int64 = np.zeros(len(GRID), np.int64)

    def record(self, tokens: int, seconds: float) -> None:
        """Take in one step: `tokens` in its forward pass, `seconds` from end to end."""
        if tokens < 1 or not 0 < seconds < float("inf"):
            return
        at = self._place(tokens)
        # What the sample says of T(1) if the shape is right, and of the shape if the scale is right.
        if self.scale == 0.0:
            self.scale = seconds / self.shape_at(tokens)
        expected = self.scale * self.shape_at(tokens)
        known = self.samples[at] >= 3
        ratio = seconds / expected
        bounded = min(max(ratio, 0.5), 2.0) if known else ratio
        self.samples[at] += 1
        if known or self.samples.sum() <= 3:
            self.scale *= 1.0 + self.SCALE_RATE * (bounded - 1.0)
        self._weight[at] = min(self._weight[at] + 1.0, self.MEMORY)
        self._raw[at] += (self._raw[at] * bounded - self._raw[at]) / self._weight[at]
        fit_monotone(self._raw, self._weight, self._prior, self.shape)

    def shape_at(self, tokens: int) -> float:
        """T(tokens) / T(1)."""
        return float(interpolate(GRID, self.shape, tokens))

    def samples_at(self, tokens: int) -> int:
        """Steps seen near `tokens`."""
        return int(self.samples[self._place(tokens)])

    def _place(self, tokens: int) -> int:
        return int(np.abs(self._log_grid - math.log(max(tokens, 1))).argmin())

    def table(self) -> dict[int, float]:
        """T(n) in seconds, for the n that were measured."""
        return {
            int(n): self.scale * float(shape)
            for n, shape, samples in zip(GRID, self.shape, self.samples, strict=True)
            if samples
        }


class Pacer:
    """Cuts drafts to what pays, and keeps account of how they did.

    Attributes:
        step_time: T(n).
        steps: `cut` calls with anything drafted; `verified`: those that left something to verify; `explored`: of these,
            the ones that were only tried out.
        calibration: float64 `(CALIBRATION_BUCKETS, 3)`: tokens judged, of them right, and the sum of their
            probabilities, by tenths of the probability that a token is right if its ancestors are.
    """

    FIRST_PLAIN = 3
    """Steps without a draft that come first, for T of a plain step to be known."""

    def __init__(self, settings: PacingSettings | None = None) -> None:
        self.settings = settings or PacingSettings()
        self.step_time = StepTime(self.settings.prior_slope)
        self.steps = self.verified = self.explored = 0
        self.calibration: Float64 = np.zeros((CALIBRATION_BUCKETS, 3))
        self._paid = False
        self._run = 0

    def cut(self, drafts: Drafts, sequences: int) -> Drafts:
        """The part of `drafts` that is worth verifying in a step with `sequences` sequences; O(t log t).

        Sequences without a draft count too: they are in the same forward pass. Chains and trees alike.
        """
        total = len(drafts.tokens)
        if total == 0:
            return drafts
        self.steps += 1
        threshold = best_threshold(
            drafts.probability, sequences, GRID, self.step_time.shape, 1.0 + self.settings.margin
        )
        pays = threshold <= 1.0
        self._run = self._run + 1 if pays == self._paid else 0
        self._paid = pays
        if self._run >= self.settings.explore or self.step_time.samples_at(sequences) < self.FIRST_PLAIN:
            self._run = 0
            self.explored += 1
            pays = self.step_time.samples_at(sequences) >= self.FIRST_PLAIN and not pays
            threshold = 0.0
        if not pays:
            return Drafts.empty(drafts.rows)
        self.verified += 1
        kept = drafts.probability >= threshold
        if kept.all():
            return drafts
        offsets = np.concatenate([[0], np.cumsum(kept)])[drafts.offsets]
        return Drafts(drafts.tokens[kept], drafts.parents[kept], drafts.probability[kept], drafts.source[kept], offsets)

    def record(self, tokens: int, seconds: float) -> None:
        """Take in one step: `tokens` in its forward pass, `seconds` from end to end, drafting included."""
        self.step_time.record(tokens, seconds)

    def judge(self, probability: Float32, accepted: int) -> None:
        """Take in how one verified chain did: its cumulative probabilities, and how many tokens were accepted."""
        conditional = probability.astype(np.float64)
        conditional[1:] /= np.maximum(probability[:-1], 1e-9)
        for i in range(min(len(conditional), accepted + 1)):
            bucket = min(int(conditional[i] * CALIBRATION_BUCKETS), CALIBRATION_BUCKETS - 1)
            self.calibration[bucket] += (1, i < accepted, conditional[i])

    def report(self) -> dict[str, Any]:
        """What was decided and why, for people: T(n) in milliseconds, counts, the calibration table."""
        rows = [
            {"tokens": int(count), "predicted": total / count, "observed": right / count}
            for count, right, total in self.calibration
            if count
        ]
        return {
            "step_ms": {n: round(1e3 * seconds, 3) for n, seconds in self.step_time.table().items()},
            "steps": self.steps,
            "verified": self.verified,
            "explored": self.explored,
            "calibration": rows,
        }


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
def fit_monotone(raw: Float64, weight: Float64, prior: Float64, shape: Float64) -> None:
    """Write the non-falling fit of `raw` to `shape`, 1 at its first place.

    Points that were never measured say nothing: they take the value that the measured ones around them give, and
    beyond those the prior's slope.
    """
    # Pools of adjacent points with one mean each.
    means = np.empty(len(raw))
    weights = np.empty(len(raw))
    ends = np.empty(len(raw), np.int64)
    pools = 0
    for i in range(len(raw)):
        if weight[i] < 1.0:
            continue
        means[pools], weights[pools], ends[pools] = raw[i], weight[i], i
        pools += 1
        while pools > 1 and means[pools - 2] > means[pools - 1]:
            both = weights[pools - 2] + weights[pools - 1]
            means[pools - 2] = (means[pools - 2] * weights[pools - 2] + means[pools - 1] * weights[pools - 1]) / both
            weights[pools - 2] = both
            ends[pools - 2] = ends[pools - 1]
            pools -= 1
    if pools == 0:
        shape[:] = prior
        return
    pool = 0
    for i in range(len(raw)):
        if weight[i] < 1.0:
            continue
        while i > ends[pool]:
            pool += 1
        shape[i] = means[pool]
    # The unmeasured: between neighbours in proportion to the prior's rise, outside by the prior's ratio.
    left = -1
    for i in range(len(raw)):
        if weight[i] >= 1.0:
            left = i
            continue
        right = i
        while right < len(raw) and weight[right] < 1.0:
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


@kernel
def best_threshold(probability: Float32, sequences: int, grid: Int64, shape: Float64, least: float) -> float:
    """The lowest probability worth verifying, or 2 where no draft gains `least` times the rate of none."""
    ordered = np.sort(probability)
    expected = float(sequences)
    best = expected / interpolate(grid, shape, sequences)
    needed = best * least
    threshold = 2.0
    for k in range(len(ordered)):
        p = ordered[len(ordered) - 1 - k]
        expected += p
        rate = expected / interpolate(grid, shape, sequences + k + 1)
        if rate > best and rate > needed:
            best = rate
            threshold = p
    return threshold
