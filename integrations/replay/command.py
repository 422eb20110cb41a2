"""`freedraft replay`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from freedraft.integrations.replay.costs import Cost, read_cost
from freedraft.integrations.replay.recorded import Request, Tokenizer, read_requests
from freedraft.integrations.replay.simulate import Outcome, replay, told_pacer
from freedraft.plugins.config import Config, parse_config
from freedraft.plugins.pacing import pacer_for
from freedraft.plugins.registry import drafter_from_config
from freedraft.retrieval.errors import InputError


def replay_command(
    recorded: Annotated[
        list[Path],
        typer.Argument(
            help="Recorded requests: JSON lines with prompt and reply (texts), messages (a chat), or prompt_ids and "
            "reply_ids (token ids); or a token trace (.npz)."
        ),
    ],
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or name of the model's tokenizer; needed for texts and chats.")
    ] = None,
    drafter: Annotated[list[str] | None, typer.Option(help="Drafter to try; repeatable. Default: fusion.")] = None,
    config: Annotated[
        list[Path] | None, typer.Option(help="YAML file with a drafter and its settings, to try too; repeatable.")
    ] = None,
    cost: Annotated[
        str,
        typer.Option(
            help="What verifying costs: gpu or cpu (typical curves), a number (the cost of one more token, as a share "
            "of a step), or a file that `freedraft measure-cost` wrote."
        ),
    ] = "gpu",
    streams: Annotated[int, typer.Option(min=1, help="Requests that are served at a time.")] = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="Stop after about so many reply tokens.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw speed-up by cost, calibration and sources into this file (PNG, PDF, SVG).")
    ] = None,
) -> None:
    """Tell from recorded requests what drafting would bring: tokens a step, acceptance, speed-up. Needs no model."""
    curve = read_cost(cost)
    configs = _configs(drafter or [], config or [])
    loaded = _tokenizer(tokenizer)
    requests = _first(list(chain.from_iterable(read_requests(path, loaded) for path in recorded)), limit)
    outcomes = {name: run(chosen, requests, curve, streams) for name, chosen in configs.items()}
    if plot is not None:
        from freedraft.integrations.replay.plot import draw

        draw(plot, outcomes, {name: _by_cost(chosen, requests, streams) for name, chosen in configs.items()})
    if as_json:
        report = {
            "requests": len(requests),
            "cost": curve.name,
            "streams": streams,
            "drafters": {name: outcome.as_dict() for name, outcome in outcomes.items()},
        }
        typer.echo(json.dumps(report, indent=1))
        return
    _show(outcomes, curve, len(requests), streams)


def run(config: Config, requests: list[Request], cost: Cost, streams: int) -> Outcome:
    """Replay with the drafter that a configuration names, new and unaware of other runs."""
    drafter = drafter_from_config(config)
    pacer = told_pacer(pacer_for(drafter, config.sections.get("pacing", {})), cost)
    return replay(drafter, requests, cost, pacer=pacer, streams=streams)


def _configs(drafters: list[str], files: list[Path]) -> dict[str, Config]:
    configs = {name: Config(name) for name in drafters}
    for path in files:
        configs[path.stem] = parse_config(path)
    return configs or {"fusion": Config("fusion")}


def _tokenizer(name: str | None) -> Tokenizer | None:
    if name is None:
        return None
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ImportError(f"--tokenizer: {error}; install freedraft[hf]") from error
    try:
        loaded: Tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(f"--tokenizer {name}: {error}") from error
    return loaded


def _first(requests: list[Request], limit: int | None) -> list[Request]:
    if limit is None:
        return requests
    chosen, total = [], 0
    for request in requests:
        if total >= limit:
            break
        chosen.append(request)
        total += len(request.reply)
    return chosen


COSTS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2)


def _by_cost(config: Config, requests: list[Request], streams: int) -> dict[float, float]:
    return {share: run(config, requests, read_cost(str(share)), streams).speedup for share in COSTS}


def _show(outcomes: Mapping[str, Outcome], cost: Cost, requests: int, streams: int) -> None:
    console = Console() if sys.stdout.isatty() else Console(width=100)
    tokens = next(iter(outcomes.values())).tokens
    at_a_time = "one at a time" if streams == 1 else f"{streams} at a time"
    table = Table(title=f"{requests} requests, {tokens} reply tokens, {at_a_time}; cost: {cost.name}", title_style="")
    for column in ("drafter", "tokens a step", "drafted a step", "accepted", "predicted speed-up"):
        table.add_column(column, justify="left" if column == "drafter" else "right")
    for name, outcome in outcomes.items():
        table.add_row(
            name,
            f"{outcome.tokens_per_step:.2f}",
            f"{outcome.drafted_per_step:.2f}",
            f"{outcome.acceptance:.0%}",
            f"{outcome.speedup:.2f} x",
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
