"""Progress on a terminal; nothing where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    ProgressColumn,
    SpinnerColumn,
    Task,
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


class ProgressBar:
    """Shows bytes read, tokens a second and the time left, on stderr, while it is entered.

    Args:
        console: on stderr; not a terminal = shows nothing.
    """

    def __init__(self, console: Console) -> None:
        self._bars = Bars(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            _Rate(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._shown = 0.0
        self._task = self._bars.add_task("reading", total=None)

    def __enter__(self) -> ProgressBar:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def show(self, progress: Progress) -> None:
        """Bring the bar up to date, some times a second: cheap enough to call for every document."""
        now = monotonic()
        if now - self._shown < REFRESH_SECONDS and not progress.finishing:
            return
        self._shown = now
        what = "building" if progress.finishing else "reading"
        self._bars.update(
            self._task,
            description=f"{what}, {progress.documents:,} documents",
            completed=progress.bytes_read,
            total=progress.total_bytes,
            tokens=progress.tokens,
        )


@contextmanager
def waiting(console: Console, what: str) -> Iterator[None]:
    """Show that something is at work, and for how long, while it is entered.

    Args:
        console: on stderr; not a terminal = shows nothing.
        what: is done.
    """
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Bars(*columns, console=console, disable=not console.is_terminal, transient=True) as bars:
        bars.add_task(what, total=None)
        yield


class _Rate(ProgressColumn):
    """Tokens, and tokens a second since the beginning."""

    def render(self, task: Task) -> Text:
        tokens = task.fields.get("tokens", 0)
        rate = tokens / task.elapsed if task.elapsed else 0.0
        return Text(f"{tokens:,} tokens, {rate:,.0f}/s")
