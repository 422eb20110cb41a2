"""How far a long piece of work is, told by those who do it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

Report = Callable[[float], None]
"""Called with the share that is done, never falling, from 0 to 1."""
ReportTokens = Callable[[int, int], None]
"""Called with the tokens that are done, and those that are to be done in all."""


def nobody(share: float) -> None:
    """A report that nobody reads."""


def part(report: Report, start: float, end: float) -> Report:
    """The report of a piece of work that begins and ends at these shares of the whole."""
    return lambda share: report(start + share * (end - start))


def in_turn(tokens: Sequence[int], report: ReportTokens | None) -> Iterator[Report]:
    """The reports of pieces of work, of so many tokens each, that are done one after another."""
    done = 0
    for number in tokens:
        yield nobody if report is None else partial(_told, report, done, number, sum(tokens))
        done += number


def _told(report: ReportTokens, done: int, number: int, total: int, share: float) -> None:
    report(done + int(share * number), total)
