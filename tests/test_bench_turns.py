"""The turns of the live benchmarks: who goes on when, and what each one's clock says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))

import turns


@pytest.fixture
def now(monkeypatch):
    """The machine's clock, in a list; it runs when it is told."""
    clock = [100.0]
    monkeypatch.setattr(turns, "perf_counter", lambda: clock[0])
    return clock


def test_pieces_alternate_and_each_clock_is_its_own(now):
    taking = turns.Turns()
    order = []

    def work(steps, seconds):
        started = taking.clock()
        for _ in range(steps):
            taking.pass_on()
            order.append(taking.name)
            now[0] += seconds
        return taking.clock() - started

    results = taking.run({"a": lambda: work(3, 1.0), "b": lambda: work(2, 10.0), "c": lambda: work(1, 0.5)})
    assert results == {"a": 3.0, "b": 20.0, "c": 0.5}
    assert order == ["a", "b", "c", "a", "b", "a"]
    assert taking.name == ""


def test_outside_of_turns_there_is_nobody_to_wait_for(now):
    taking = turns.Turns()
    taking.pass_on()
    assert taking.clock() == 100.0
    assert taking.run({}) == {}


def test_what_one_raises_ends_all(now):
    taking = turns.Turns()
    with pytest.raises(ZeroDivisionError):
        taking.run({"a": taking.pass_on, "b": lambda: 1 / 0})
    assert taking.name == ""
    assert taking.run({"c": lambda: 3}) == {"c": 3}
