"""Progress on a terminal; nothing where there is none."""

from __future__ import annotations

from time import monotonic
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import (
    Progress as Bars,
)
from rich.text import Text

from freedraft.retrieval.build.packing import Progress

REFRESH_SECONDS = 0.1


class _Bar:
    """One line on stderr while it is entered.

    Args:
        console: on stderr; not a terminal = shows nothing.
    """

    def __init__(self, console: Console, what: str, *columns: ProgressColumn) -> None:
        self._bars = Bars(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            *columns,
            _Rate(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._shown = 0.0
        self._task = self._bars.add_task(what, total=None)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def _is_due(self) -> bool:
        now = monotonic()
        if now - self._shown < REFRESH_SECONDS:
            return False
        self._shown = now
        return True


class ProgressBar(_Bar):
    """Shows bytes read, tokens a second and the time left of a build."""

    def __init__(self, console: Console) -> None:
        super().__init__(console, "reading", DownloadColumn(binary_units=True))

    def show(self, progress: Progress) -> None:
        """Bring the bar up to date, some times a second: cheap enough to call for every document."""
        if not self._is_due() and not progress.finishing:
            return
        what = "building" if progress.finishing else "reading"
        self._bars.update(
            self._task,
            description=f"{what}, {progress.documents:,} documents",
            completed=progress.bytes_read,
            total=progress.total_bytes,
            tokens=progress.tokens,
        )


class TokenBar(_Bar):
    """Shows how many of the tokens are done, how many a second, and the time left.

    Args:
        what: is done.
    """

    def __init__(self, console: Console, what: str) -> None:
        super().__init__(console, what, TaskProgressColumn())

    def show(self, done: int, total: int) -> None:
        """Bring the bar up to date, some times a second."""
        if self._is_due() or done == total:
            self._bars.update(self._task, completed=done, total=total, tokens=done)


class _Rate(ProgressColumn):
    """Tokens, and tokens a second since the beginning."""

    def render(self, task: Task) -> Text:
        tokens = task.fields.get("tokens", 0)
        rate = tokens / task.elapsed if task.elapsed else 0.0
        return Text(f"{tokens:,} tokens, {rate:,.0f}/s")
