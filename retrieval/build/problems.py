"""What was wrong with the input: counted, remembered with its place, and skipped, or else the end of the build."""

from __future__ import annotations

from collections import Counter
from enum import Enum

from freedraft.retrieval.index.errors import SourceError

SHOWN_A_KIND = 3


class ProblemKind(Enum):
    """A kind of problem; the value is what a person reads, for one and for several."""

    BINARY = ("binary file", "binary files")
    UNREADABLE = ("unreadable file", "unreadable files")
    DAMAGED = ("damaged file", "damaged files")
    UNDECODABLE = ("undecodable line", "undecodable lines")
    TOO_LONG = ("overlong line", "overlong lines")
    BROKEN_JSON = ("broken JSON line", "broken JSON lines")
    MISSING_FIELD = ("record without the field", "records without the field")
    BAD_PATTERN = ("bad pattern in a .gitignore", "bad patterns in .gitignore files")
    WRONG_VALUE = ("unusable value", "unusable values")


class Problems:
    """The problems met so far.

    Args:
        strict: the first one raises.

    Attributes:
        counts: of each kind.
        first: of each kind, the first `SHOWN_A_KIND`: place and detail.
    """

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict
        self.counts: Counter[ProblemKind] = Counter()
        self.first: dict[ProblemKind, list[str]] = {}

    def add(self, kind: ProblemKind, place: str, detail: str) -> None:
        """Count a problem at `place`: a file, or `file:line`.

        Raises:
            SourceError: with `strict`.
        """
        # A file's name may hold what no terminal can print.
        message = f"{place}: {detail}".encode("utf-8", "replace").decode()
        if self.strict:
            raise SourceError(message)
        self.counts[kind] += 1
        shown = self.first.setdefault(kind, [])
        if len(shown) < SHOWN_A_KIND:
            shown.append(message)

    def __bool__(self) -> bool:
        return bool(self.counts)

    def lines(self) -> list[str]:
        """A report: for each kind a line with its count, and below it the first places."""
        report = []
        for kind, count in self.counts.most_common():
            report.append(f"skipped {count} {kind.value[count > 1]}:")
            report += [f"  {message}" for message in self.first[kind]]
            if count > SHOWN_A_KIND:
                report.append(f"  and {count - SHOWN_A_KIND} more")
        return report

    def as_json(self) -> list[dict[str, object]]:
        """The same for programs."""
        return [
            {"kind": kind.name.lower(), "count": count, "first": self.first[kind]}
            for kind, count in self.counts.most_common()
        ]
