"""Pacing: how many of the drafted tokens are worth verifying now.

`pacing_rule` has the rule, `step_time` learns what a step costs. Here they meet: when to verify, when to try what is
not thought best so as to keep T current, and the account of how it went.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from pydantic import Field

from freedraft.plugins.base import Drafts
from freedraft.plugins.calibration import NO_PARENTS, buckets, judge_nodes, nothing_judged
from freedraft.plugins.config import Settings, validate_settings
from freedraft.plugins.pacing_choice import choices
from freedraft.plugins.step_time import StepTime
from freedraft.retrieval.ragged import Float32, Float64, Int32, Int64


class PacingSettings(Settings):
    """Settings of the section `pacing`; `pacing: off` and `pacing: on` in short."""

    enabled: bool | None = Field(
        None,
        description="Whether to pace drafts. By default those of drafters whose probabilities are calibrated, such as "
        "`fusion`, and of any drafter for which this section is given.",
    )
    margin: float = Field(
        0.02,
        ge=0,
        le=1,
        description="Draft only where the expected gain in tokens is above this share of a plain step's.",
    )
    explore: int = Field(
        100,
        ge=2,
        description="After so many steps that all verified a draft, or all none though there was one, or all trees or "
        "all chains though it could be either, try the other "
        "once: T of both has to be known, and changes. Steps without a draft are tried from four times as often to "
        "half as often, so that it costs about half a percent.",
    )
    prior_slope: float = Field(
        0.03, ge=0, description="What one more token is taken to cost, as a share of a step, until that is measured."
    )
    uniform: bool = Field(
        False,
        description="Verify all that was drafted or nothing. In vLLM, whose full CUDA graphs want one length, either "
        "every sequence gets `num_speculative_tokens` tokens, its draft filled up with its last token, or none does.",
    )


@dataclass(slots=True)
class _OfSize:
    """What is kept of the steps with batches of about one size.

    Attributes:
        step_time: T.
        since_plain, since_verified: steps since the last one without a draft, or with one that was verified; a first
            one without is not it where drafts spill.
        tree: of the last draft that could have been a tree or chains, a tree was thought better.
        of_this_shape: so many of these in a row were thought so.
        left_out: the highest probability that the last cut left out.
        tokens, time: what was expected of the latest steps, a fading sum; as of plain steps.
        waited: steps without a draft for want of T, before anything was verified.
        missed: trials that nobody measured, since the last that was.
        odd_trials, odd_behind, odd_trees: in a row up to now: odd trials, drafts behind trials without one, trees.
    """

    step_time: StepTime
    since_plain: int = 0
    since_verified: int = 0
    tree: bool = False
    of_this_shape: int = 0
    left_out: float = 0.0
    tokens: float = 1.0
    time: float = 1.0
    waited: int = 0
    missed: int = 0
    odd_trials: int = 0
    odd_behind: int = 0
    odd_trees: int = 0


class Pacer:
    """Cuts drafts to what pays, and keeps account of how they did.

    A runtime calls, at every step that is no prefill, `cut` with the drafts, `judge` with what became of those that it
    verified, and `record` with the time of the whole step. Calls from several threads wait for one another.

    Attributes:
        spills: part of what a draft costs shows in the step after it, which has more tokens to hand out: in vLLM on a
            CPU 2.5 % of a step. Then a plain step is measured only where the one before it was plain, too.
        steps: `cut` calls with anything drafted; `verified`: those that left something to verify; `explored`: steps
            that did what was not thought best, to measure it.
        trees: steps that verified a tree.
        drafted, kept: tokens that came into `cut`, and that it left.
        calibration: how the tokens did that were verified; see the module of that name.
    """

    FIRST_PLAIN = 3
    """Steps without a draft that come first, for T of a plain step to be known."""
    GAIN_MEMORY = 0.995
    BELOW_LAST = 2.0
    """The odds of what was left out last are this and one more times those of the floor, for one sequence."""
    ODD = 1.25
    """A trial that takes so many times what is expected, or as small a part, is soon repeated; so is one without a
    draft where the draft right behind it does so."""
    SOON = 8
    """Steps until then."""
    AT_ONCE = 3
    """Odd trials in a row that may be repeated at once."""
    TRUST_MEMORY = 0.99
    """What of the account of how drafts did lately is left after a token that was verified, and after a step."""
    TRUST_LEFT = 0.5
    """What is left of it at least, however many tokens a step verified."""
    DOUBT = 5.0
    """Tokens that it takes for that account to count for as much as what drafts say of themselves."""
    MOST_ODD = 20
    """So many at most are counted: by then they wait for millions of steps."""

    def __init__(self, settings: PacingSettings | None = None) -> None:
        self.settings = settings or PacingSettings()
        self.spills = True
        self._now = _OfSize(StepTime(self.settings.prior_slope))
        self._of_size = {(1).bit_length(): self._now}
        self.steps = self.verified = self.explored = self.trees = 0
        self.drafted = self.kept = 0
        self.calibration: Float64 = nothing_judged()
        self._expected = self._accepted = 0.0
        self._plain_in_a_row = 2
        self._exploring = self._verifying = self._after_plain_trial = self._first_plain = False
        self._unmeasured = False
        self._tried = 0
        self._lock = threading.Lock()

    @property
    def step_time(self) -> StepTime:
        """T of the batch size of now. As many tokens of few sequences cost something else than of many, so each size
        has its own, up to a factor of two; one that is told (`StepTime.known`) serves all.
        """
        return self._now.step_time

    @step_time.setter
    def step_time(self, step_time: StepTime) -> None:
        self._now.step_time = step_time

    def cut(self, drafts: Drafts, sequences: int, filled: int = 0, *, padded: bool = False) -> Drafts:
        """The part of `drafts` that is worth verifying in a step with `sequences` sequences; O(t log t).

        Sequences without a draft count too: they are in the same forward pass. Of trees, what is left may branch, or
        be their likeliest chains, whichever is worth more.

        Args:
            drafts: what was drafted.
            sequences: how many sequences there are.
            filled: draft tokens that the pass would take where the runtime fills drafts up to one length; only for
                `uniform`.
            padded: the pass takes as many tokens for every sequence as for the one with the longest draft.
        """
        with self._lock:
            self._turn_to(sequences)
            return self._cut(drafts, sequences, filled, padded)

    def _cut(self, drafts: Drafts, sequences: int, filled: int, padded: bool) -> Drafts:
        total = len(drafts.tokens)
        self._expected *= self.TRUST_MEMORY
        self._accepted *= self.TRUST_MEMORY
        # A trial of two steps goes on; but where there was a prompt in the step, say, nothing was learnt.
        if not (self.spills and self._plain_in_a_row == 1 and not self._verifying):
            self._miss_trial()
        self._after_plain_trial = self._exploring and not self._verifying and not self._first_plain
        self._exploring = self._first_plain = False
        if total == 0:
            self._after_plain_trial = False
            self._now.left_out = 0.0
            self._plain_step()
            return drafts
        self.steps += 1
        self.drafted += total
        sequences = max(sequences, 1)
        gain = max(self.gain, 1.0)
        filled_up = filled if self.settings.uniform else None
        part, *others = choices(drafts, self.trust, sequences, self.step_time, gain, padded, filled_up)
        pays = bool(part.surplus > self.settings.margin * sequences)
        self._first_plain = self._waits_for_plain_steps
        if self._first_plain:
            self._now.waited += 1
            verify = False
        elif pays:
            verify = self._now.since_plain < self._plain_every()
        else:
            verify = self._now.since_verified >= self.settings.explore
        self._exploring, self._verifying = verify != pays, verify
        self._unmeasured = self._exploring and not self._first_plain and not self.step_time.told
        self.explored += self._exploring
        if not verify:
            self._now.left_out = 0.0
            self._plain_step()
            return Drafts.empty(drafts.rows)
        self._now.since_plain += 1
        self._now.since_verified = 0
        self._plain_in_a_row = 0
        self.verified += 1
        self._tried += self._exploring
        if others and self._time_for_the_other_shape(part.tree):
            part = others[0]
            if not self._exploring:
                self.explored += 1
                self._tried += 1
        self.trees += part.tree
        kept = part.cut()
        # In padded passes a token may cost nothing, and says nothing of the price of others.
        self._now.left_out = 0.0 if padded else part.left_out
        self.kept += len(kept.tokens)
        self._expect(1.0 + part.expected / sequences, part.cost)
        return kept

    @property
    def _waits_for_plain_steps(self) -> bool:
        """Nothing is verified before T of a plain step is known; but not for ever, where no step can be measured."""
        return self.step_time.plain_steps < self.FIRST_PLAIN and self._now.waited < max(
            self.settings.explore, self.FIRST_PLAIN + 1
        )

    def _time_for_the_other_shape(self, tree: bool) -> bool:
        """Take in a step that could verify a tree or chains, of which one is thought better; whether to try the other.

        What a tree costs more is known only where there are both, and changes.
        """
        self._now.of_this_shape = self._now.of_this_shape + 1 if tree == self._now.tree else 1
        self._now.tree = tree
        if self._now.of_this_shape <= self.settings.explore:
            return False
        self._now.of_this_shape = 0
        return True

    def _turn_to(self, sequences: int) -> None:
        """Let `_now` be that of a batch of so many sequences."""
        if not self.step_time.told:
            size = max(sequences, 1).bit_length()
            if size not in self._of_size:
                step_time = StepTime(self.settings.prior_slope, 2 ** (size - 1))
                # Until more is known of this size, the gain is taken to be the one of now.
                self._of_size[size] = _OfSize(step_time, tokens=self._now.tokens, time=self._now.time)
            if self._now is not self._of_size[size]:
                self._miss_trial()
                self._now = self._of_size[size]
                self._exploring = self._after_plain_trial = False  # what was tried was of another size

    def _miss_trial(self) -> None:
        """If the last step was a trial that nobody measured, make it again: soon, and later each time."""
        if not self._unmeasured:
            return
        if not self._verifying:
            self._now.since_plain = 0
        self._try_again(self._verifying, False, self._now.missed)
        self._now.missed = min(self._now.missed + 1, self.MOST_ODD)
        self._unmeasured = self._exploring = False

    def _plain_step(self) -> None:
        """Take in a step without a draft; the first after one with a draft is not measured where drafts spill."""
        self._now.since_verified += 1
        self._now.since_plain = 0 if self._plain_in_a_row or not self.spills else self._now.since_plain + 1
        self._plain_in_a_row += 1
        self._expect(1.0, 1.0)

    def _plain_every(self) -> float:
        """Steps after which one without a draft is tried, or two where drafts spill.

        Each loses `1 - 1 / gain` of a step, so that at any gain the trials cost half a percent. Everything is measured
        by T of a plain step, whose error decides where the gain is small.
        """
        loss = 1.0 - 1.0 / max(self.gain, 1.0)
        return self.settings.explore * min(max(4.0 * loss, 0.25), 2.0)

    @property
    def gain(self) -> float:
        """Tokens a second as a multiple of plain decoding's, as expected of the latest some hundred steps with
        batches of about the size of now.
        """
        now = self._now  # another thread may be asking
        return now.tokens / now.time

    def _expect(self, tokens: float, time: float) -> None:
        """Take in a step: tokens a sequence, and time as a multiple of a plain step's."""
        self._now.tokens = self.GAIN_MEMORY * self._now.tokens + tokens
        self._now.time = self.GAIN_MEMORY * self._now.time + time

    def floor(self, sequences: int, most: int) -> float:
        """A probability below which hardly a token of the next draft is going to pay, so that none need be drafted.

        It is below the most that the last cut left out, in odds: a third of its odds for one sequence, the part
        `1 / (1 + 2 / sqrt(S))` for S, for the next cut is going to differ the less. Or the price of a token in a step
        that can gain nothing, where T rises least, from `sequences` to `most` tokens on. 0 where anything may be tried,
        in particular when it is time to, and where drafts are uniform: what is not drafted saves nothing then.
        """
        with self._lock:
            self._turn_to(sequences)
            if self.settings.uniform:
                return 0.0
            if self._now.since_verified >= self.settings.explore or self._waits_for_plain_steps:
                return 0.0
            least = self.step_time.least_slope(sequences, most)
            below = 1.0 + self.BELOW_LAST / math.sqrt(max(sequences, 1))
            left_out = self._now.left_out / (self._now.left_out + below * (1.0 - self._now.left_out))
            price = math.sqrt(max(self.gain, 1.0)) * sequences * least / self.trust
            return min(max(price, left_out), 1.0) if math.isfinite(price) else left_out

    def record(self, sequences: int, drafted: int, seconds: float, tree: bool = False) -> None:
        """Take in one step: its sequences, the draft tokens that it verified, its time with drafting.

        Args:
            tree: a draft was more than a chain.
        """
        with self._lock:
            if self.spills and self._plain_in_a_row == 1:
                return
            self._turn_to(sequences)
            as_tried = (drafted > 0) == self._verifying
            if self._unmeasured and as_tried:
                self._unmeasured, self._now.missed = False, 0
            ratio = self.step_time.record(sequences, drafted, seconds, tree)
            odd = not 1 / self.ODD < ratio < self.ODD
            if self._exploring and as_tried and not self._first_plain:
                if odd:
                    self._try_again(self._verifying, ratio < 2 / 3, self._now.odd_trials)
                self._now.odd_trials = min(self._now.odd_trials + 1, self.MOST_ODD) if odd else 0
            elif self._after_plain_trial and drafted:
                if odd:
                    # What was learnt from the trial is not the whole truth.
                    self._try_again(False, ratio > 3 / 2, self._now.odd_behind)
                self._now.odd_behind = min(self._now.odd_behind + 1, self.MOST_ODD) if odd else 0
            if tree:
                self._now.odd_trees = min(self._now.odd_trees + 1, self.MOST_ODD) if odd else 0
                if odd and not self._now.tree:
                    # Likewise, where chains are thought better.
                    wait = self.SOON * 2 ** (self._now.odd_trees - 1)
                    self._now.of_this_shape = max(self._now.of_this_shape, self.settings.explore - wait)

    def _try_again(self, verify: bool, at_once: bool, odd: int) -> None:
        """Repeat a trial, with a draft if `verify`, else without: soon, or at once if `at_once`.

        With `odd` of them in a row before, it waits longer: T may be of a form that is never learnt well.
        """
        wait = 0 if at_once and odd < self.AT_ONCE else self.SOON * 2**odd
        if verify:
            # A plain step is measured first, to set it against.
            self._now.since_verified = max(self._now.since_verified, self.settings.explore - 1 - self.spills - wait)
        else:
            self._now.since_plain = max(self._now.since_plain, int(self._plain_every()) + 1 - wait)

    def judge(self, probability: Float32, offsets: Int64, last: Int64, parents: Int32 = NO_PARENTS) -> None:
        """Take in how drafts did that were verified; arguments as of `judge_nodes`."""
        with self._lock:
            expected, accepted = judge_nodes(probability, offsets, last, parents, self.calibration)
            left = max(self.TRUST_MEMORY ** len(probability), self.TRUST_LEFT)
            self._expected = left * self._expected + expected
            self._accepted = left * self._accepted + accepted

    @property
    def trust(self) -> float:
        """What probabilities are worth just now, as a share of what they say, 1 at most.

        Where less was right lately than was expected, by more than the standard deviation of a count, as when requests
        of another kind come, drafts are cut the shorter until their drafter has learnt better.
        """
        chance = math.sqrt(self._expected)
        return min((self._accepted + chance + self.DOUBT) / (self._expected + self.DOUBT), 1.0)

    @property
    def decisions(self) -> dict[str, int]:
        """Steps that had a draft, by what was done: `verified` or `plain`, as was thought best, or `explored`."""
        with self._lock:
            plain = self.steps - self.verified - (self.explored - self._tried)
            return {"verified": self.verified - self._tried, "plain": plain, "explored": self.explored}

    def report(self) -> dict[str, Any]:
        """What was decided and why, for people and JSON.

        `step_ms` is T in milliseconds by tokens in the pass, for the batch size of now and drafts that are chains,
        `tree_ms` what a tree takes more (a guess until it was measured), `verified` and `trees` the steps that verified
        a draft and a tree, `gain` the tokens a second that are expected, as a multiple of plain decoding's, `trust`
        what probabilities have been worth lately, `calibration` the predicted and the observed share of right tokens,
        given that all before them were right, by tenths of the prediction.
        """
        with self._lock:
            return {
                "step_ms": {n: round(1e3 * seconds, 3) for n, seconds in self.step_time.table().items()},
                "tree_ms": round(1e3 * self.step_time.speed * self.step_time.tree_price(self.step_time.sequences), 3),
                "gain": round(self.gain, 4),
                "steps": self.steps,
                "verified": self.verified,
                "trees": self.trees,
                "explored": self.explored,
                "drafted": self.drafted,
                "kept": self.kept,
                "trust": round(self.trust, 4),
                "calibration": buckets(self.calibration),
            }


def pacer_for(drafter: Any, section: Mapping[str, Any]) -> Pacer | None:
    """The pacer that the section `pacing` of a configuration asks for, None where drafts are not to be paced.

    Args:
        drafter: the drafter; paced without being asked for when it has a true attribute `calibrated`.
        section: the section, empty where none was given.

    Raises:
        ConfigError: unknown setting or bad value.
    """
    settings = validate_settings(PacingSettings, section, "pacing")
    enabled = settings.enabled
    if enabled is None:
        enabled = bool(section) or bool(getattr(drafter, "calibrated", False))
    return Pacer(settings) if enabled else None


def compile_kernels() -> None:
    """Compile every kernel of pacing now, so that no step waits for it."""
    drafts = Drafts(
        np.arange(2, dtype=np.int32),
        np.array([-1, 0], np.int32),
        np.array([0.9, 0.1], np.float32),
        np.zeros(2, np.uint8),
        np.array([0, 2]),
    )
    tree = replace(drafts, parents=np.array([-1, -1], np.int32))
    a_part_pays = StepTime.known(lambda n: 1.0 + 0.5 * (n - 1))
    all_of_it_pays = StepTime.known(lambda n: 1.0 + 0.01 * (n - 1))
    for padded in (False, True):
        for step_time in (a_part_pays, all_of_it_pays):
            pacer = Pacer()
            pacer.step_time = step_time
            pacer.floor(1, 1)
            for one in (tree, drafts):
                cut = pacer.cut(one, 1, padded=padded)
                pacer.judge(cut.probability, cut.offsets, np.array([0]), cut.parents)
    pacer = Pacer()
    pacer.record(1, 0, 1.0)
    pacer.record(1, 0, 1.0)
    pacer.floor(1, 1)
    pacer.cut(drafts, 1)
