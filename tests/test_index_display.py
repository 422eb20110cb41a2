"""Progress of the index's commands: on a terminal how far, how fast and how long still; elsewhere nothing."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from freedraft.retrieval.build import display
from freedraft.retrieval.build.display import ProgressBar, waiting
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


def test_something_at_work_says_so_and_takes_no_markup():
    on = console(terminal=True)
    with waiting(on, "writing anew what holds [/red] a.txt"):
        pass
    assert "writing anew what holds [/red] a.txt 0:00:0" in drawn(on)


@pytest.mark.parametrize("showing", [ProgressBar, lambda on: waiting(on, "merging")])
def test_nothing_where_there_is_no_terminal(showing):
    on = console(terminal=False)
    with showing(on) as bar:
        if bar is not None:
            bar.show(Progress(documents=1, finishing=True))
    assert drawn(on) == ""
