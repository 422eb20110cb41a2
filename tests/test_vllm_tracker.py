"""The sequence tracker against a model of vLLM's batch: the tracked text is the row's text, whatever happened."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from freedraft.integrations.vllm.fingerprint import fingerprint
from freedraft.integrations.vllm.table import EDGE
from freedraft.integrations.vllm.tracker import SequenceTracker, Step
from freedraft.retrieval.errors import InputError

WIDTH = 400
ROWS = 6
STALE = 7_777_777


@dataclass
class Request:
    """A request as vLLM knows it; `computed` tokens have gone through the model."""

    text: list[int]
    computed: int = 0


class Batch:
    """vLLM's persistent batch: rows of one array, filled, condensed and swapped as its `InputBatch` does it."""

    def __init__(self, rows: int = ROWS, width: int = WIDTH) -> None:
        self.tokens = np.full((rows, width), STALE, np.int32)
        self.length = np.full(rows, width - 1, np.int32)
        self.rows: list[Request | None] = [None] * rows

    @property
    def running(self) -> list[Request]:
        return [request for request in self.rows if request is not None]

    def write(self, i: int) -> None:
        request = self.rows[i]
        assert request is not None
        self.tokens[i, : len(request.text)] = request.text
        self.length[i] = len(request.text)

    def add(self, request: Request) -> None:
        i = self.rows.index(None)
        self.rows[i] = request
        self.write(i)

    def remove(self, request: Request) -> None:
        self.rows[self.index(request)] = None

    def index(self, request: Request) -> int:
        return next(i for i, other in enumerate(self.rows) if other is request)

    def swap(self, i: int, j: int) -> None:
        self.rows[i], self.rows[j] = self.rows[j], self.rows[i]
        self.write(i)
        self.write(j)

    def condense(self) -> None:
        while None in self.rows[: len(self.running)]:
            empty = self.rows.index(None)
            last = max(i for i, request in enumerate(self.rows) if request is not None)
            self.rows[empty], self.rows[last] = self.rows[last], None
            self.write(empty)

    def call(self, tracker: SequenceTracker, new: list[int]) -> Step:
        """Call the tracker as a proposer is called; everything stale is poisoned first."""
        count = len(new)
        for i, request in enumerate(self.rows):
            if request is None:
                self.tokens[i] = STALE
                self.length[i] = WIDTH - 1
            else:
                self.tokens[i, len(request.text) :] = STALE
        before = self.tokens.copy()
        step = tracker.step(self.length, np.array(new, np.int64), self.tokens)
        np.testing.assert_array_equal(self.tokens, before)
        assert len(step.sequences) == count
        return step


class Follower:
    """Does to lists of tokens what a proposer does to a drafter, and refuses what a drafter may refuse."""

    def __init__(self) -> None:
        self.texts: dict[int, list[int]] = {}
        self.handed = 0

    def follow(self, step: Step) -> None:
        for sequence in step.closed.tolist():
            del self.texts[sequence]
        for sequence in step.opened.tolist():
            assert sequence not in self.texts
            self.texts[sequence] = []
        assert len(set(step.growing.tolist())) == len(step.growing)
        for j, sequence in enumerate(step.growing.tolist()):
            self.texts[sequence] += step.tokens[step.offsets[j] : step.offsets[j + 1]].tolist()
        self.handed = len(step.tokens)


payloads = st.lists(st.integers(0, 1), min_size=1, max_size=3)
picks = st.integers(0, 2**32 - 1)


class Engine(RuleBasedStateMachine):
    """Random histories of a batch. Prompts are cut from one template and replies run into one another, so that texts
    often agree in length, head and tail and differ in the middle."""

    options: ClassVar[dict[str, int]] = {}

    @initialize()
    def start(self) -> None:
        self.batch = Batch()
        self.waiting: list[Request] = []
        self.tracker = SequenceTracker(ROWS, **self.options)
        self.follower = Follower()

    def admit(self, prompt: list[int]) -> None:
        request = Request(prompt[: WIDTH // 2])
        if len(self.batch.running) < ROWS:
            self.batch.add(request)
        else:
            self.waiting.append(request)

    @rule(payload=payloads, tail=st.sampled_from([0, EDGE, EDGE, EDGE + 1]), copies=st.integers(1, 3))
    def add_from_template(self, payload: list[int], tail: int, copies: int) -> None:
        for _ in range(copies):
            self.admit([0] * EDGE + payload + [0] * tail)

    @rule(prompt=st.lists(st.integers(0, 2), min_size=1, max_size=5), copies=st.integers(1, 2))
    def add_short(self, prompt: list[int], copies: int) -> None:
        for _ in range(copies):
            self.admit(prompt)

    @rule(pick=picks, more=st.lists(st.integers(0, 1), max_size=3))
    def add_next_turn(self, pick: int, more: list[int]) -> None:
        everyone = self.batch.running + self.waiting
        if everyone:
            self.admit(everyone[pick % len(everyone)].text + more)

    @rule(pick=picks, place=picks)
    def replace_by_near_copy(self, pick: int, place: int) -> None:
        """A request leaves, and one that differs in a single token, of any age, takes its row before the next call."""
        if self.batch.running:
            request = self.batch.running[pick % len(self.batch.running)]
            text = list(request.text)
            text[place % len(text)] ^= 1
            row = self.batch.index(request)
            self.batch.remove(request)
            self.batch.rows[row] = Request(text)
            self.batch.write(row)

    @rule(pick=picks)
    def finish_or_abort(self, pick: int) -> None:
        everyone = self.batch.running + self.waiting
        if everyone:
            request = everyone[pick % len(everyone)]
            if any(request is other for other in self.waiting):
                self.waiting = [other for other in self.waiting if other is not request]
            else:
                self.batch.remove(request)

    @rule(pick=picks)
    def preempt(self, pick: int) -> None:
        if self.batch.running:
            request = self.batch.running[pick % len(self.batch.running)]
            self.batch.remove(request)
            request.computed = 0
            self.waiting.append(request)

    @precondition(lambda self: self.waiting)
    @rule()
    def resume(self) -> None:
        if len(self.batch.running) < ROWS:
            self.batch.add(self.waiting.pop(0))

    @rule(one=picks, other=picks)
    def swap(self, one: int, other: int) -> None:
        self.batch.condense()
        count = len(self.batch.running)
        if count:
            self.batch.swap(one % count, other % count)

    @rule(pick=picks, dropped=st.integers(1, 3))
    def truncate(self, pick: int, dropped: int) -> None:
        if self.batch.running:
            request = self.batch.running[pick % len(self.batch.running)]
            if len(request.text) > dropped:
                del request.text[-dropped:]
                self.batch.write(self.batch.index(request))

    @rule(seed=picks, chunk=st.sampled_from([1, 8, WIDTH]), times=st.sampled_from([1, 1, 2, 15]))
    def steps(self, seed: int, chunk: int, times: int) -> None:
        choice = random.Random(seed)
        for _ in range(times):
            self.run(choice, chunk)
            self.show()

    @rule(seed=picks)
    def step_without_a_call(self, seed: int) -> None:
        self.run(random.Random(seed), WIDTH)

    def run(self, choice: random.Random, chunk: int) -> None:
        """One step of the model, for all rows."""
        self.batch.condense()
        self.new = []
        for i, request in enumerate(self.batch.running):
            # A request that is still in its prompt, or recomputes after a preemption, brings nothing new; the step
            # that ends this brings a single token, and only a later one can have had a draft.
            drafted = request.computed == len(request.text) - 1
            request.computed = min(request.computed + chunk, len(request.text))
            tokens = [0] * choice.choice([1, 1, 2, 3] if drafted else [1])
            if choice.random() < 0.05:
                tokens[-1] = choice.choice([1, 2])
            if request.computed < len(request.text) or len(request.text) + len(tokens) > WIDTH:
                tokens = []
            request.text += tokens
            request.computed += max(0, len(tokens) - 1)
            self.new.append(len(tokens))
            self.batch.write(i)

    def show(self) -> None:
        """The call that follows a step, and what must hold after it."""
        step = self.batch.call(self.tracker, self.new)
        self.follower.follow(step)
        held = step.sequences.tolist()
        assert len({sequence for sequence in held if sequence >= 0}) == sum(sequence >= 0 for sequence in held)
        assert sorted(self.follower.texts) == self.tracker.known.tolist()
        for i, request in enumerate(self.batch.running):
            self.compare(i, request, step)

    def compare(self, i: int, request: Request, step: Step) -> None:
        """Every row is tracked, caught up and right."""
        assert step.ready[i]
        assert self.follower.texts[step.sequences[i]] == request.text


class Unread(Engine):
    """The same without routine reading beyond one row a step: only suspicion makes the tracker read.

    Then a near copy can be mistaken for the sequence whose row it took, in the case that the tracker's docstring
    describes and no other, and no longer than it says.
    """

    options: ClassVar[dict[str, int]] = {"routine_tokens": 0}
    wrong_for = ROWS
    young_are_read = True

    @initialize()
    def start(self) -> None:
        super().start()
        self.wrong: dict[int, int] = {}
        self.first: dict[int, int] = {}
        self.last: dict[int, tuple[Request, list[int]]] = {}
        self.known: dict[int, list[int]] = {}
        self.held: dict[int, int] = {}

    def show(self) -> None:
        self.held = {}
        super().show()
        self.last = {i: (request, list(request.text)) for i, request in enumerate(self.batch.running)}
        for i, sequence in self.held.items():
            if sequence not in self.wrong:
                self.known[sequence] = list(self.batch.running[i].text)
        self.known = {sequence: self.known[sequence] for sequence in self.follower.texts if sequence in self.known}

    def compare(self, i: int, request: Request, step: Step) -> None:
        assert step.ready[i]
        self.compare_text(i, request, step)

    def compare_text(self, i: int, request: Request, step: Step) -> None:
        sequence = int(step.sequences[i])
        text = self.follower.texts[sequence]
        self.held[i] = sequence
        if sequence in step.opened:
            self.known.pop(sequence, None)
            self.first[sequence] = len(request.text)
            self.wrong.pop(sequence, None)
        if text == request.text[: len(text)]:
            self.wrong.pop(sequence, None)
        elif sequence not in self.wrong:
            self.assert_excusable(i, request, sequence)
            self.wrong[sequence] = 1
        else:
            self.wrong[sequence] += 1
            assert self.wrong[sequence] <= self.wrong_for

    def assert_excusable(self, i: int, request: Request, sequence: int) -> None:
        """This is the one documented case."""
        predecessor, text = self.last[i]
        assert request is not predecessor
        assert len(request.text) == len(text) + self.new[i]
        assert request.text[:EDGE] == text[:EDGE]
        assert request.text[len(text) - EDGE : len(text)] == text[-EDGE:]
        assert len(text) - self.first[sequence] >= EDGE or not self.young_are_read
        # The tracker knew no sequence with just the text that this one had before the step.
        before = request.text[: len(text)]
        assert before not in [known for other, known in self.known.items() if other != sequence]


class Small(Unread):
    """The same with little room and little reading, so that sequences are evicted, put off, and caught up slowly.

    Not every row need be tracked in every step then, but what is tracked must be right: all of a ready row, the
    beginning of another.
    """

    options: ClassVar[dict[str, int]] = {"step_tokens": 20, "idle_sequences": 2, "idle_tokens": 60, "most_read": 150}
    wrong_for = 1000
    young_are_read = False

    def compare(self, i: int, request: Request, step: Step) -> None:
        assert self.follower.handed <= 20
        sequence = int(step.sequences[i])
        if sequence < 0:
            assert not step.ready[i]
        else:
            assert step.ready[i] == (len(self.follower.texts[sequence]) == len(request.text))
            self.compare_text(i, request, step)


def explore(machine: type[Engine], histories: int, steps: int = 30) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=histories,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize("machine", [Engine, Small, Unread])
def test_tracked_text_is_the_rows_text(machine: type[Engine]) -> None:
    explore(machine, 500)


@pytest.mark.slow
@pytest.mark.parametrize("machine", [Engine, Small, Unread])
def test_tracked_text_is_the_rows_text_over_many_histories(machine: type[Engine]) -> None:
    explore(machine, 5000, 60)


class Script:
    """A batch that a test moves by hand."""

    def __init__(self, texts: list[list[int]], rows: int = ROWS, width: int = WIDTH, **options: int) -> None:
        self.batch = Batch(rows, width)
        self.tracker = SequenceTracker(rows, **options)
        self.follower = Follower()
        for text in texts:
            self.batch.add(Request(list(text)))

    def step(self, new: list[list[int]] | None = None, seen: bool = True) -> Step | None:
        """Commit `new` to the rows, nothing by default, and call the tracker unless the call is skipped."""
        added = new or [[] for _ in self.batch.running]
        for i, request in enumerate(self.batch.running):
            request.text += added[i]
            self.batch.write(i)
        if not seen:
            return None
        step = self.batch.call(self.tracker, [len(tokens) for tokens in added])
        self.follower.follow(step)
        return step

    def right(self, step: Step) -> list[bool]:
        return [
            sequence >= 0 and self.follower.texts[sequence] == request.text
            for request, sequence in zip(self.batch.running, step.sequences.tolist(), strict=True)
        ]


HEAD = [5] * EDGE
TAIL = [6] * EDGE


def near_copies(count: int) -> list[list[int]]:
    """Texts that agree but for one token in the middle."""
    return [HEAD + [i] + TAIL for i in range(count)]


def unlike_texts(count: int) -> list[list[int]]:
    """Texts that begin differently, so that none is like another that is known."""
    return [[i] * EDGE + [99] + TAIL for i in range(count)]


def replace_by_near_copies(script: Script) -> None:
    """Every request leaves, and one that differs in a token in the middle takes its row."""
    for i, request in enumerate(script.batch.running):
        text = list(request.text)
        text[EDGE] += 1
        script.batch.rows[i] = Request(text)


def test_replies_that_diverged_and_met_again_are_told_apart_after_a_swap() -> None:
    script = Script(near_copies(4), routine_tokens=0)
    script.step()
    for _ in range(EDGE + 3):
        script.step([[0]] * 4)
    script.batch.swap(0, 1)
    script.batch.swap(2, 3)
    step = script.step([[0]] * 4)
    assert script.right(step) == [True] * 4
    assert script.follower.handed == 4


def test_young_sequences_are_told_from_others_of_their_template() -> None:
    script = Script(unlike_texts(4), routine_tokens=0)
    script.step()
    for _ in range(EDGE - 1):
        script.step([[0]] * 4)
    replace_by_near_copies(script)
    assert script.right(script.step([[0]] * 4)) == [True] * 4


def test_young_sequences_are_told_from_others_that_came_in_a_skipped_call() -> None:
    script = Script(unlike_texts(4), routine_tokens=0)
    script.step()
    replace_by_near_copies(script)
    for request in script.batch.running:
        del request.text[-1]
    script.step([TAIL[-1:]] * 4, seen=False)
    assert script.right(script.step([[0, 0]] * 4)) == [True] * 4


def test_a_sequence_is_young_again_when_its_next_turn_begins() -> None:
    script = Script(unlike_texts(4), routine_tokens=0)
    script.step()
    for _ in range(EDGE):
        script.step([[0]] * 4)
    for i, request in enumerate(script.batch.running):
        script.batch.rows[i] = Request(request.text + [7] + TAIL)
    assert script.right(script.step([[0]] * 4)) == [True] * 4
    replace_by_near_copies(script)
    assert script.right(script.step([[0]] * 4)) == [True] * 4


def test_text_that_another_row_handed_out_meanwhile_is_found_out() -> None:
    script = Script([[i] * 150 for i in range(4)], routine_tokens=0, step_tokens=20)
    script.step()
    for _ in range(EDGE + 1):
        step = script.step([[9]] * 4)
    owner = script.batch.running[int(np.argmin(step.ready))]
    # A row that moves is read, so that its turn does not come in the next two steps.
    script.batch.swap(script.batch.index(owner), (script.batch.index(owner) + 1) % 4)
    step = script.step([[9]] * 4)
    row = script.batch.index(owner)
    place = len(script.follower.texts[step.sequences[row]])
    for _ in range(2):
        text = list(script.batch.running[row].text)
        text[place] ^= 64
        script.batch.rows[row] = Request(text)
        step = script.step([[9]] * 4)
    assert script.follower.texts[step.sequences[row]] != text[: place + 1]
    for _ in range(4):
        step = script.step([[9]] * 4)
    # Each row had its turn to be read; what is built anew since gets what the other rows' new tokens leave of 20.
    followed = script.follower.texts[step.sequences[row]]
    assert followed == script.batch.running[row].text[: len(followed)]
    for _ in range(30):
        step = script.step([[9]] * 4)
    assert script.right(step) == [True] * 4


def test_a_near_copy_of_a_replys_text_in_its_row_is_found_out_in_as_many_steps_as_rows() -> None:
    script = Script(unlike_texts(4), routine_tokens=0)
    script.step()
    for _ in range(EDGE):
        script.step([[0]] * 4)
    replace_by_near_copies(script)
    right = [sum(script.right(script.step([[0]] * 4))) for _ in range(4)]
    assert right == [1, 2, 3, 4]


def test_a_near_copy_is_found_out_at_once_where_all_rows_are_read() -> None:
    script = Script(unlike_texts(4))
    script.step()
    for _ in range(EDGE):
        script.step([[0]] * 4)
    replace_by_near_copies(script)
    assert script.right(script.step([[0]] * 4)) == [True] * 4


def test_identical_rows_have_sequences_of_their_own() -> None:
    script = Script([[1, 2, 3]] * 3)
    step = script.step()
    assert len(set(step.sequences.tolist())) == 3
    step = script.step([[4], [5], [4]])
    assert script.right(step) == [True] * 3
    assert len(set(step.sequences.tolist())) == 3


def test_rows_that_move_bring_only_their_new_tokens() -> None:
    script = Script([[i, *range(100), i] for i in range(6)])
    script.step()
    requests = list(script.batch.running)
    script.batch.swap(0, 3)
    assert script.right(script.step([[7]] * 6)) == [True] * 6
    assert script.follower.handed == 6
    script.batch.remove(requests[1])
    script.batch.condense()
    assert script.right(script.step([[7, 8]] * 5)) == [True] * 5
    assert script.follower.handed == 10
    script.batch.remove(requests[3])
    script.batch.condense()
    script.step([[9]] * 4)
    script.batch.add(requests[3])
    assert script.right(script.step([[9], [9], [9], [9], []])) == [True] * 5
    assert script.follower.handed == 4


def test_tokens_of_skipped_calls_are_caught_up() -> None:
    script = Script([[1, 2, 3], [4, 5]])
    script.step()
    script.step([[1, 1, 1], [2]], seen=False)
    script.batch.swap(0, 1)
    script.step([[3], [4, 4]], seen=False)
    step = script.step([[5], [6]])
    assert script.right(step) == [True, True]
    assert step.previous.tolist() == [2, 3]
    assert script.follower.handed == 9


def test_a_shortened_row_is_a_new_sequence() -> None:
    script = Script([[1, 2, 3, 4, 5]])
    script.step()
    del script.batch.running[0].text[-2:]
    script.batch.write(0)
    step = script.step([[9]])
    assert script.right(step) == [True]
    assert step.previous.tolist() == [0]


def test_long_prompts_are_handed_out_over_steps_shortest_first() -> None:
    script = Script([list(range(290)), list(range(1000, 1090)), [1]], step_tokens=100)
    step = script.step()
    assert len(step.tokens) == 100
    assert step.ready.tolist() == [False, True, True]
    for tokens, ready in ((100, False), (100, False), (90, True)):
        step = script.step([[1], [2], [3]])
        assert len(step.tokens) == tokens
        assert step.ready.tolist() == [ready, True, True]
    assert script.right(step) == [True] * 3


def test_idle_sequences_and_their_tokens_are_bounded_and_the_least_recent_goes_first() -> None:
    script = Script([[i] * 50 for i in range(5)], idle_sequences=2, idle_tokens=1000)
    script.step()
    requests = list(script.batch.running)
    for request in requests[:4]:
        script.batch.remove(request)
        script.batch.condense()
        script.step()
    assert len(script.tracker.known) == 3
    for request in requests[:4]:
        script.batch.add(request)
    step = script.step()
    assert script.right(step) == [True] * 5
    # Sequences 2 and 3 were kept, 0 and 1 had to be taken in again.
    assert script.follower.handed == 100
    crowded = Script([[i] * 50 for i in range(5)], idle_sequences=9, idle_tokens=120)
    crowded.step()
    for request in list(crowded.batch.running)[:4]:
        crowded.batch.remove(request)
    crowded.batch.condense()
    crowded.step()
    assert len(crowded.tracker.known) == 3


def test_a_sequence_that_is_in_no_row_for_too_long_is_forgotten() -> None:
    script = Script([[i] * 50 for i in range(3)], idle_steps=3)
    script.step()
    gone = script.batch.running[0]
    script.batch.remove(gone)
    script.batch.condense()
    for _ in range(3):
        assert not len(script.step().closed)
    assert len(script.step().closed) == 1
    script.batch.add(gone)
    assert script.right(script.step()) == [True] * 3
    assert script.follower.handed == 50


def test_reading_is_bounded_and_rows_put_off_are_not_built_anew() -> None:
    script = Script([[i] * 100 for i in range(6)], most_read=250, step_tokens=10_000, idle_sequences=0)
    for _ in range(3):
        step = script.step()
    assert script.right(step) == [True] * 6
    for i in range(3):
        script.batch.swap(i, 5 - i)
    known = []
    for _ in range(3):
        step = script.step([[1]] * 6)
        known.append(sum(script.right(step)))
        assert len(step.tokens) < 20
        assert not len(step.opened)
    assert known == [2, 4, 6]


def test_a_row_longer_than_what_may_be_read_is_tracked_all_the_same() -> None:
    script = Script([[1] * 300, [2] * 300], most_read=10)
    script.step()
    assert script.right(script.step([[1], [1]])) == [True, True]
    script.batch.swap(0, 1)
    script.step([[1], [1]])
    assert script.right(script.step([[1], [1]])) == [True, True]


def test_a_row_with_something_else_than_tokens_has_no_sequence_until_it_has_tokens() -> None:
    script = Script([[1, 2, -1, 4], [3, 3]])
    step = script.step()
    assert step.sequences[0] == -1
    assert not step.ready[0]
    assert step.ready[1]
    script.batch.running[0].text[2] = 9
    assert script.right(script.step([[1], [-1]])) == [True, False]
    script.batch.running[1].text[2] = 4
    assert script.right(script.step()) == [True, True]
    assert script.follower.handed == 1


def test_forgotten_sequences_are_handed_out_anew() -> None:
    script = Script([[1, 2, 3], [4, 5]])
    step = script.step()
    script.tracker.forget(step.sequences[:1])
    del script.follower.texts[step.sequences[0]]
    step = script.step([[6], [6]])
    assert script.right(step) == [True, True]
    assert script.follower.handed == 5


def test_no_row_and_an_empty_row() -> None:
    script = Script([])
    assert len(script.step().sequences) == 0
    script = Script([[], [1]])
    assert script.step().sequences.tolist() == [-1, 0]


@pytest.mark.parametrize(
    ("length", "new", "tokens", "message"),
    [
        (np.zeros(9, np.int32), np.zeros(9, np.int64), np.zeros((9, 4), np.int32), "at most 6 rows, got 9"),
        (np.zeros(6, np.int64), np.zeros(6, np.int64), np.zeros((6, 4), np.int32), "length: expected int32"),
        (np.zeros(6, np.int32), np.zeros(6, np.int64), np.zeros((6, 4), np.int64), "tokens: expected int32"),
        (np.zeros(6, np.int32), np.zeros(6, np.int64), np.zeros((5, 4), np.int32), "tokens: expected int32"),
        (np.full(6, 5, np.int32), np.zeros(6, np.int64), np.zeros((6, 4), np.int32), "length: expected 0 to 4"),
        (np.full(6, -1, np.int32), np.zeros(6, np.int64), np.zeros((6, 4), np.int32), "length: expected 0 to 4"),
    ],
)
def test_arrays_of_another_kind_are_refused(length: object, new: object, tokens: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SequenceTracker(ROWS).step(length, new, tokens)


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(InputError, match="step_tokens: expected at least 1, got 0"):
        SequenceTracker(ROWS, step_tokens=0)


def test_fingerprints_add_up_and_know_tokens_and_places() -> None:
    row = np.random.default_rng(1).integers(0, 50_000, 1000).astype(np.int32)
    whole = int(fingerprint(row, 0, 1000))
    for cut in (0, 1, 500, 999, 1000):
        parts = int(fingerprint(row, 0, cut)) + int(fingerprint(row, cut, 1000))
        assert parts % 2**64 == whole
    seen = {whole}
    for i in range(999):
        changed = row.copy()
        changed[i] += 1
        seen.add(int(fingerprint(changed, 0, 1000)))
        changed = row.copy()
        changed[i : i + 2] = changed[i : i + 2][::-1]
        if changed[i] != row[i]:
            seen.add(int(fingerprint(changed, 0, 1000)))
    swaps = int((row[1:] != row[:-1]).sum())
    assert len(seen) == 1 + 999 + swaps
