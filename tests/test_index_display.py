"""Progress of the index's commands: on a terminal how far, how fast and how long still; elsewhere nothing."""

from __future__ import annotations

import io
import re

from rich.console import Console

from freedraft.retrieval.build import display
from freedraft.retrieval.build.display import ProgressBar, TokenBar
from freedraft.retrieval.build.packing import Progress


def console(terminal):
    return Console(file=io.StringIO(), force_terminal=terminal, width=160, color_system=None)


def drawn(on):
    """What a person has seen."""
    return on.file.getvalue()


def test_a_build_says_how_far_and_how_fast(monkeypatch):
    monkeypatch.setattr(display, "REFRESH_SECONDS", 0.0)
    on = console(terminal=True)
    with ProgressBar(on) as bar:
        bar.show(Progress(bytes_read=1 << 20, total_bytes=4 << 20, documents=1200, tokens=3000))
        bar._bars.refresh()
        reading = drawn(on)
        bar.show(Progress(bytes_read=4 << 20, total_bytes=4 << 20, documents=1300, tokens=4000, finishing=True))
        bar._bars.refresh()
    assert "reading, 1,200 documents" in reading
    assert "1.0/4.0 MiB" in reading
    assert "3,000 tokens, " in reading
    assert "building, 1,300 documents" in drawn(on)


def test_other_work_says_how_far_and_how_fast_and_takes_no_markup(monkeypatch):
    monkeypatch.setattr(display, "REFRESH_SECONDS", 0.0)
    on = console(terminal=True)
    with TokenBar(on, "merging [/red]") as bar:
        bar.show(2000, 8000)
        bar._bars.refresh()
        begun = drawn(on)
        bar.show(8000, 8000)
        bar._bars.refresh()
    assert re.search(r"merging \[/red\] .* 25% 2,000 tokens, [\d,]+/s 0:00:0\d ", begun)
    assert re.search(r"100% 8,000 tokens, [\d,]+/s 0:00:0\d 0:00:00", drawn(on))


def test_the_end_is_shown_however_soon_it_comes(monkeypatch):
    monkeypatch.setattr(display, "REFRESH_SECONDS", 60.0)
    on = console(terminal=True)
    with TokenBar(on, "checking") as bar:
        for done in range(5):
            bar.show(done, 4)
    assert "100% 4 tokens, " in drawn(on)


def test_nothing_where_there_is_no_terminal():
    on = console(terminal=False)
    with ProgressBar(on) as bar:
        bar.show(Progress(documents=1, finishing=True))
    with TokenBar(on, "merging") as bar:
        bar.show(1, 1)
    assert drawn(on) == ""
