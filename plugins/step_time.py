"""What a step costs by its sequences and the draft tokens that it verifies, learnt from the steps that are taken."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from freedraft.retrieval.borrowing import borrowed
from freedraft.retrieval.jit import kernel
from freedraft.retrieval.lending import Lent
from freedraft.retrieval.ragged import Float64, Int64

# The numbers of tokens for which a T(n) that is told is kept; beyond the last it grows in proportion.
_GRID = [*range(1, 17), *range(20, 33, 4), *range(40, 65, 8), *range(80, 129, 16), 192, 256, 384, 512, 768]
GRID: Int64 = np.array([*_GRID, 1024, 1536, 2048, 4096, 8192, 16384], np.int64)
BENDS: Int64 = np.array([0, 3, 7, 15, 31], np.int64)
"""Where T may bend: draft tokens, as multiples of S0."""
FAR = 2**20
"""Draft tokens, more than any step has: up to there the last line goes on."""
SWEEPS = 30
"""Of the solver, each step: from the last solution it is not far."""
FEATURES = 4 + len(BENDS)
TREE = FEATURES - 1
TREE_PRIOR = 0.02
"""What a draft that branches is taken to cost, as a share of a step, until that is measured."""


class Learning(NamedTuple):
    """What T is learnt from, m parameters of it.

    Attributes:
        squares, products: float64 `(m, m)` and `(m,)`, the sums of the normal equations.
        trust, prior: float64 `(m,)`, how much what each is taken to be weighs, in samples, and what that is.
        parameters: float64 `(m,)`.
    """

    squares: Float64
    products: Float64
    trust: Float64
    prior: Float64
    parameters: Float64


class StepTime:
    """The time of a step, T, for batches of about one size, learnt from the steps that were taken.

    T is a speed, which follows the growing context and the load of the machine, times a shape, which changes slowly:

        1 + a x (S - S0) / S0 + b x [d > 0] + c[0] x d / S0 + c[1] x max(d / S0 - BENDS[1], 0) + ... + e x [tree]

    for S sequences and d draft tokens, none of the parameters below 0. A step without drafts may run on other kernels,
    hence b; behind it T is convex: memory bounds the first tokens, and arithmetic the later ones. A draft that branches
    needs a mask, and its accepted path has to be gathered, hence e. So few parameters learn from some tens of steps,
    each from all, and nothing seems free because of one lucky step.

    They are the weighted least squares solution (non-negative, by coordinate descent; errors relative) of all steps,
    whose weights fade, and a prior, which weighs the more the noisier the steps are. A step that takes much longer or
    shorter than expected counts at most by a part of that. The speed learns from every step; the shape only from the
    first steps of a size in a row, set against the latest few: one more that is slower than those before it tells of
    the machine.

    Attributes:
        told: it was not measured, and never is.
        sequences: the smallest batch that it is for, S0; larger ones have less than twice as many.
        speed: seconds of a step of S0 sequences without a draft; 0 before the first sample.
        plain_steps, draft_steps, tree_steps: steps seen, without a draft, with chains only, and with a tree.
    """

    FIRST = 5
    """Steps of a kind that may surprise more; the first speed is the median of as many."""
    FADE = 0.995
    """By this the weight of what was measured falls with every step that the shape learns from."""
    SURPRISE, FIRST_SURPRISE = 1.4, 3.0
    """At most so many times what is expected, or as small a part of it, a step is taken to take."""
    KEPT = 0.25
    """What is left of the weight of all that was measured when T has changed."""
    SPEED_RATE = 0.2
    LATELY = 5
    """Steps that tell the machine's speed of just now."""
    TELLING = 2
    """Steps of one size in a row of which the shape learns."""
    NOISE = 0.03
    """A relative error of steps for which the prior weighs twice as much as without any."""
    NOISE_RATE = 0.1

    told = False

    def __init__(self, prior_slope: float, sequences: int = 1) -> None:
        self.sequences = sequences
        self.speed = 0.0
        self.plain_steps = self.draft_steps = self.tree_steps = 0
        slope = prior_slope * sequences / (1.0 + prior_slope * (sequences - 1))
        prior = np.zeros(FEATURES)
        prior[0], prior[1], prior[3], prior[TREE] = 1.0, slope, slope, TREE_PRIOR
        trust = np.concatenate([[0.5, 4.0, 0.05, 0.1], (1.0 + BENDS[1:]) ** 2 / 4.0, [0.05]])
        self._squares: Float64 = np.zeros((FEATURES, FEATURES))
        self._products: Float64 = np.zeros(FEATURES)
        self._parameters: Float64 = prior.copy()
        self._learning = lend(Learning(self._squares, self._products, trust, prior, self._parameters))
        # Of the batch size that was asked for last, until more is learnt.
        self._knots: tuple[int, tuple[float, Int64, Float64]] | None = None
        self._first: list[float] = []
        self._lately: list[float] = []
        self._last = (0, 0, False)
        self._run = 0
        # The mean square of the relative errors, by steps of one size right after another.
        self._noise = 0.0
        self._last_seconds = 0.0
        self._most_drafted = 0
        # By kind (no draft, chains, a tree): how the last one surprised, and whether another, since, did not.
        self._surprises = [0, 0, 0]
        self._calm = [False, False, False]

    def record(self, sequences: int, drafted: int, seconds: float, tree: bool = False) -> float:
        """Take in one step of `seconds` from end to end. Nonsense and smaller batches are left out.

        Args:
            tree: a draft was more than a chain.

        Returns:
            How long the step took, as a multiple of what was expected.
        """
        if sequences < self.sequences or drafted < 0 or not 0 < seconds < float("inf"):
            return 1.0
        expected = expected_time(self._parameters, sequences, drafted, tree, self.sequences)
        if len(self._first) < self.FIRST:
            self._first.append(seconds / expected)
            self.speed = median(self._first)
        ratio = seconds / (expected * (median(self._lately) if self._lately else self.speed))
        kind = (sequences, drafted, tree)
        if kind == self._last:
            self._run += 1
            surprise = min(abs(math.log(seconds / self._last_seconds)), math.log(self.SURPRISE))
            self._noise += self.NOISE_RATE * (surprise**2 / 2 - self._noise)
        else:
            self._run = 1
        self._last, self._last_seconds = kind, seconds
        if self._run <= self.TELLING:
            most = self._believed(2 if tree else int(drafted > 0), ratio)
            expected = self._learn(sequences, drafted, tree, expected, min(max(ratio, 1 / most), most))
        if tree:
            self.tree_steps += 1
        elif drafted:
            self.draft_steps += 1
        else:
            self.plain_steps += 1
        self._most_drafted = max(self._most_drafted, drafted)
        now = seconds / expected
        self.speed *= 1.0 + self.SPEED_RATE * (min(max(now / self.speed, 0.5), 2.0) - 1.0)
        self._lately = [*self._lately[1 - self.LATELY :], now]
        return ratio

    def _believed(self, kind: int, ratio: float) -> float:
        """The factor by which this step, of such a kind, may differ from what is expected.

        One that surprises is held to be a stray; where the last of its kind did so too, and another kind, seen in
        between, did not, T has changed: then what was learnt before counts little.
        """
        surprise = int(ratio > self.SURPRISE) - int(ratio < 1 / self.SURPRISE)
        changed = surprise != 0 and surprise == self._surprises[kind] and self._calm[kind]
        for other in range(len(self._calm)):
            self._calm[other] = surprise != self._surprises[other]
        self._surprises[kind], self._calm[kind] = surprise, False
        if changed:
            self._squares *= self.KEPT
            self._products *= self.KEPT
        few = (self.plain_steps, self.draft_steps, self.tree_steps)[kind] < self.FIRST
        return self.FIRST_SURPRISE if few or changed else self.SURPRISE

    def _learn(self, sequences: int, drafted: int, tree: bool, expected: float, ratio: float) -> float:
        """Take in what the shape can learn of a step; return what it expects of such a one then."""
        weight = 1.0 + self._noise / self.NOISE**2
        first, expected = learn(
            self._learning, sequences, drafted, tree, self.sequences, expected, ratio, self.FADE, weight
        )
        self._knots = None
        self.speed *= first
        self._first = [one * first for one in self._first]
        self._lately = [one * first for one in self._lately]
        return expected

    @classmethod
    def known(cls, curve: Callable[[int], float]) -> StepTime:
        """A T that is told, in seconds by the tokens in the forward pass, and not measured: samples change nothing."""
        return _Known(curve)

    def knots(self, sequences: int) -> tuple[float, Int64, Float64]:
        """T of a batch of so many sequences, up to a factor.

        Returns:
            T without a draft; and the numbers of tokens in the forward pass between which T is linear with a draft,
            int64, with T there, float64.
        """
        if self._knots is None or self._knots[0] != sequences:
            self._knots = sequences, knots_of(self._parameters, self.sequences, sequences)
        return self._knots[1]

    def cost(self, sequences: int, drafted: int) -> float:
        """T with so many draft tokens as a multiple of T without."""
        plain, grid, shape = self.knots(sequences)
        return float(interpolate(grid, shape, sequences + drafted)) / plain if drafted else 1.0

    def tree_price(self, sequences: int) -> float:
        """What drafts that branch cost more than chains of as many tokens, as a share of T without a draft."""
        return float(self._parameters[TREE]) / self.knots(sequences)[0]

    def least_slope(self, sequences: int, more: int) -> float:
        """The least that T rises by a token, as a share of T without a draft, for up to `more` draft tokens.

        T is convex behind its jump, so where it is learnt that is what the first token costs, whatever `more` is.
        """
        return float(self._parameters[3]) / self.sequences / self.knots(sequences)[0]

    def table(self) -> dict[int, float]:
        """T in seconds by tokens in the forward pass, as far as drafts went, for the batch size of the latest step."""
        if not self.plain_steps + self.draft_steps + self.tree_steps:
            return {}
        sequences, most = self._last[0], self._most_drafted
        plain, _, _ = self.knots(sequences)
        drafted = [d for d in GRID.tolist() if d < most] + [most] * (most > 0)
        return {sequences: self.speed * plain} | {
            sequences + d: self.speed * plain * self.cost(sequences, d) for d in drafted
        }


class _Known(StepTime):
    told = True

    def __init__(self, curve: Callable[[int], float]) -> None:
        super().__init__(0.0)
        self.speed = curve(1)
        self.plain_steps = 2**31
        self._shape: Float64 = np.maximum.accumulate([curve(int(n)) / self.speed for n in GRID])
        self._parameters[TREE] = 0.0

    def record(self, sequences: int, drafted: int, seconds: float, tree: bool = False) -> float:
        return 1.0

    def knots(self, sequences: int) -> tuple[float, Int64, Float64]:
        return interpolate(GRID, self._shape, sequences), GRID, self._shape

    def least_slope(self, sequences: int, more: int) -> float:
        plain, grid, shape = self.knots(sequences)
        return float(least_slope(grid, shape, sequences, sequences + more)) / plain

    def table(self) -> dict[int, float]:
        return {int(n): self.speed * float(shape) for n, shape in zip(GRID, self._shape, strict=True)}


def median(values: Sequence[float]) -> float:
    """The median of a few numbers; numpy's takes longer."""
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


@kernel
def lend(learning: Learning) -> Lent[Learning]:
    """Lend the arrays to `learn`."""
    return Lent(learning)


@kernel
def features_of(sequences: int, drafted: int, tree: bool, least: int) -> Float64:
    """What the parameters of T are multiplied with; see `StepTime`, where `least` is S0."""
    features = np.zeros(FEATURES)
    features[0] = 1.0
    features[1] = (sequences - least) / least
    if drafted:
        features[2] = 1.0
        for i in range(len(BENDS)):
            features[3 + i] = max(drafted / least - BENDS[i], 0.0)
        features[TREE] = 1.0 if tree else 0.0
    return features


@kernel
def expected_time(parameters: Float64, sequences: int, drafted: int, tree: bool, least: int) -> float:
    """T of a step by its parameters, as a multiple of its speed."""
    return (features_of(sequences, drafted, tree, least) * parameters).sum()


@kernel
def knots_of(parameters: Float64, least: int, sequences: int) -> tuple[float, Int64, Float64]:
    """See `StepTime.knots`."""
    plain = expected_time(parameters, sequences, 0, False, least)
    count = len(BENDS)
    grid = np.empty(count + 1, np.int64)
    shape = np.empty(count + 1)
    # Behind the jump, from no token on.
    grid[0], shape[0] = sequences, plain + parameters[2]
    for i in range(1, count + 1):
        drafted = BENDS[i] * least if i < count else FAR
        grid[i] = sequences + drafted
        shape[i] = expected_time(parameters, sequences, drafted, False, least)
    return plain, grid, shape


@kernel
def learn(
    learning: Lent[Learning],
    sequences: int,
    drafted: int,
    tree: bool,
    least: int,
    expected: float,
    ratio: float,
    fade: float,
    prior_weight: float,
) -> tuple[float, float]:
    """Take in a step that took `ratio` times what was expected; bring the parameters up to date, the first one 1.

    Args:
        learning: is brought up to date.
        sequences, drafted, tree, least: as of `features_of`.
        expected: of such a step, by the parameters.
        ratio: see above.
        fade: what is left of the weight of what was seen before.
        prior_weight: so many times the prior weighs what it says.

    Returns:
        The factor by which all parameters were too large; and what such a step is expected to take then.
    """
    squares, products, trust, prior, parameters = borrowed(learning.arrays)
    features = features_of(sequences, drafted, tree, least)
    weight = 1.0 / (expected * expected * ratio)
    for i in range(len(parameters)):
        for j in range(len(parameters)):
            squares[i, j] = fade * squares[i, j] + weight * features[i] * features[j]
        products[i] = fade * products[i] + weight * features[i] * expected * ratio
    solve(squares, products, prior_weight * trust, prior, parameters)
    first = max(parameters[0], 1e-3)
    parameters /= first
    products /= first
    parameters[0] = 1.0
    return first, (features * parameters).sum()


@kernel
def solve(squares: Float64, products: Float64, trust: Float64, prior: Float64, parameters: Float64) -> None:
    """Go from `parameters` towards the least squares solution that is nowhere below 0, `trust` drawing to `prior`."""
    for _ in range(SWEEPS):
        for i in range(len(parameters)):
            wanted = products[i] + trust[i] * prior[i]
            for j in range(len(parameters)):
                if j != i:
                    wanted -= squares[i, j] * parameters[j]
            parameters[i] = max(wanted / (squares[i, i] + trust[i]), 0.0)


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
    """T(tokens): linear between grid points, in proportion beyond the last."""
    last = len(grid) - 1
    if tokens >= grid[last]:
        return shape[last] * tokens / grid[last]
    at = max(int(np.searchsorted(grid, tokens, "right")) - 1, 0)
    share = (tokens - grid[at]) / (grid[at + 1] - grid[at])
    return shape[at] + share * (shape[at + 1] - shape[at])
