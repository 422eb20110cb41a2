"""`freedraft replay`."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer


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
    index: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FOLDER",
            help="Index to draft from, for the drafters that take one, such as fusion and corpus; repeatable.",
        ),
    ] = None,
    cost: Annotated[
        str,
        typer.Option(
            help="What verifying costs: gpu or cpu (typical curves), a number (the cost of one more token, as a share "
            "of a step), or a file that `freedraft measure-cost` wrote."
        ),
    ] = "gpu",
    streams: Annotated[int, typer.Option(min=1, help="Requests that are served at a time.")] = 1,
    padded: Annotated[
        bool,
        typer.Option(
            "--padded",
            help="With --streams: a step takes as many tokens for every request as for the one with the longest draft, "
            "as batches in generate do.",
        ),
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Stop after about so many reply tokens.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw speed-up by cost, calibration and sources into this file (PNG, PDF, SVG).")
    ] = None,
) -> None:
    """Tell from recorded requests what drafting would bring: tokens a step, acceptance, speed-up. Needs no model."""
    # Not at the top: this module is loaded by every command, and drafters take their time to load.
    from freedraft.integrations.replay.costs import read_cost
    from freedraft.integrations.replay.recorded import read_requests
    from freedraft.integrations.replay.runs import (
        chosen_configs,
        first_requests,
        load_tokenizer,
        rehearse,
        run,
        speed_up_by_cost,
        with_indexes,
    )
    from freedraft.integrations.replay.tables import show

    curve = read_cost(cost)
    configs = with_indexes(chosen_configs(drafter or [], config or []), index or [], tokenizer)
    loaded = load_tokenizer(tokenizer)
    requests = first_requests(list(chain.from_iterable(read_requests(path, loaded) for path in recorded)), limit)
    outcomes = {}
    for name, chosen in configs.items():
        rehearse(chosen, streams, padded)
        outcomes[name] = run(chosen, requests, curve, streams, padded)
    if plot is not None:
        from freedraft.integrations.replay.plot import draw

        by_cost = {name: speed_up_by_cost(chosen, requests, streams, padded) for name, chosen in configs.items()}
        draw(plot, outcomes, by_cost)
    if as_json:
        report = {
            "requests": len(requests),
            "cost": curve.name,
            "streams": streams,
            "padded": padded,
            "drafters": {name: outcome.as_dict() for name, outcome in outcomes.items()},
        }
        typer.echo(json.dumps(report, indent=1))
        return
    show(outcomes, curve, len(requests), streams, padded)
