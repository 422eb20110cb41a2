"""The tables of `freedraft replay`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from freedraft.integrations.replay.costs import Cost
from freedraft.integrations.replay.simulate import Outcome


def show(outcomes: Mapping[str, Outcome], cost: Cost, requests: int, streams: int, padded: bool) -> None:
    """Print how each drafter did, and of what its drafts were made."""
    console = Console() if sys.stdout.isatty() else Console(width=100)
    tokens = next(iter(outcomes.values())).tokens
    at_a_time = "one at a time" if streams == 1 else f"{streams} at a time" + (", padded" if padded else "")
    table = Table(title=f"{requests} requests, {tokens} reply tokens, {at_a_time}; cost: {cost.name}", title_style="")
    for column in ("drafter", "tokens a step", "drafted a step", "accepted", "predicted speed-up", "drafting a step"):
        table.add_column(column, justify="left" if column == "drafter" else "right")
    for name, outcome in outcomes.items():
        table.add_row(
            name,
            f"{outcome.tokens_per_step:.2f}",
            f"{outcome.drafted_per_step:.2f}",
            f"{outcome.acceptance:.0%}",
            f"{outcome.speedup:.2f} x",
            f"{outcome.drafting_us_per_step:,.0f} us",
        )
    console.print(table)
    for title, part in (("source", "sources"), ("match length", "matches")):
        console.print(_parts(title, {name: getattr(outcome, part) for name, outcome in outcomes.items()}))


def _parts(title: str, parts: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(title=f"drafted and accepted by {title}", title_style="")
    for column in ("drafter", title, "drafted", "accepted", "share"):
        table.add_column(column, justify="left" if column in ("drafter", title) else "right")
    for name, counts in parts.items():
        for key, count in counts.items():
            if count.drafted:
                share = f"{count.accepted / count.drafted:.0%}"
                table.add_row(name, key.replace("_", " "), str(count.drafted), str(count.accepted), share)
    return table
