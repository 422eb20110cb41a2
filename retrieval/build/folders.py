"""The files of a folder that git would not ignore."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from freedraft.retrieval.build.extras import require
from freedraft.retrieval.build.problems import ProblemKind, Problems
from freedraft.retrieval.index.errors import SourceError

VERSION_CONTROL = {".git", ".hg", ".svn", ".jj"}


class FolderWalk:
    """Walks folders, in order of names, honouring each `.gitignore` as git does.

    A `.gitignore` applies below its folder; the deepest that has a say wins, in it the last line that matches. Those
    above the given folder count too, up to the root of its repository, unless they ignore that very folder: whoever
    names it wants it. Symbolic links are not followed, and version control's own folders are left out.

    Args:
        include: patterns as in a `.gitignore`; files that match none are left out. None = all.
        exclude: likewise; files and folders that match one are left out.
        without: a folder that is left out wherever it is met.

    Raises:
        MissingPackageError: pathspec is not installed.
        SourceError: a bad pattern.
    """

    def __init__(
        self,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        without: str | os.PathLike[str] | None = None,
    ) -> None:
        self._pathspec = require("pathspec", "reading a folder")
        self._without = os.path.realpath(without) if without is not None else None
        try:
            self._include = self._spec(include) if include else None
            self._exclude = self._spec(exclude)
        except (ValueError, re.error) as error:
            raise SourceError(f"--include, --exclude: {error}") from error

    def files(self, folder: str, problems: Problems) -> Iterator[tuple[str, int]]:
        """The path, beginning with `folder`, and the size of each file to read.

        A folder that cannot be listed, or a `.gitignore` that cannot be read, is one of the `problems`.
        """
        top = Path(os.path.abspath(folder))
        root = next((p for p in (top, *top.parents) if (p / ".git").exists()), top)
        # What a repository's owner ignores for himself has the least say.
        rules = self._rules_in(str(root / ".git" / "info" / "exclude"), str(root), problems)
        for above in reversed([p for p in top.parents if p == root or root in p.parents]):
            rules += self._rules_of(str(above), problems)
        if _ignored(rules, f"{top}/"):
            rules = []
        yield from self._walk(str(top), folder.rstrip("/") or "/", str(top), rules, problems)

    def _walk(
        self, here: str, shown: str, top: str, rules: list[tuple[str, Any]], problems: Problems
    ) -> Iterator[tuple[str, int]]:
        rules = rules + self._rules_of(here, problems)
        try:
            entries = sorted(os.scandir(here), key=lambda entry: entry.name)
        except OSError as error:
            problems.add(ProblemKind.UNREADABLE, shown, str(error.strerror))
            return
        for entry in entries:
            is_folder = entry.is_dir(follow_symlinks=False)
            if is_folder and (entry.name in VERSION_CONTROL or os.path.realpath(entry.path) == self._without):
                continue
            suffix = "/" if is_folder else ""
            below = os.path.relpath(entry.path, top) + suffix
            if _ignored(rules, entry.path + suffix) or self._exclude.match_file(below):
                continue
            name = f"{shown.rstrip('/')}/{entry.name}"
            if is_folder:
                yield from self._walk(entry.path, name, top, rules, problems)
            elif self._include is None or self._include.match_file(below):
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISREG(status.st_mode):
                    yield name, status.st_size

    def _rules_of(self, folder: str, problems: Problems) -> list[tuple[str, Any]]:
        return self._rules_in(os.path.join(folder, ".gitignore"), folder, problems)

    def _rules_in(self, path: str, folder: str, problems: Problems) -> list[tuple[str, Any]]:
        """The rules of a file for what is below `folder`; a line that is no pattern is one of the problems."""
        if not os.path.isfile(path):
            return []
        try:
            with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
                lines = file.read().splitlines()
        except OSError as error:
            problems.add(ProblemKind.UNREADABLE, path, str(error))
            return []
        patterns = []
        for number, line in enumerate(lines, 1):
            try:
                self._spec([line])
                patterns.append(line)
            except (ValueError, re.error) as error:
                problems.add(ProblemKind.BAD_PATTERN, f"{path}:{number}", str(error))
        return [(folder, self._spec(patterns))]

    def _spec(self, lines: Any) -> Any:
        return self._pathspec.GitIgnoreSpec.from_lines(lines)


def _ignored(rules: list[tuple[str, Any]], path: str) -> bool:
    """Whether the rules, each a folder and its patterns, the deepest last, ignore `path`; folders end with "/"."""
    for folder, spec in reversed(rules):
        included = spec.check_file(path[len(folder) :].lstrip("/")).include
        if included is not None:
            return bool(included)
    return False
