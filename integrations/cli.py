"""The command line: `freedraft`."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from freedraft.integrations.demo.command import demo
from freedraft.integrations.replay.command import replay_command
from freedraft.integrations.replay.measuring import measure_cost
from freedraft.retrieval.cli import index_app
from freedraft.retrieval.errors import ConfigError, FreedraftError

app = typer.Typer(
    name="freedraft",
    help="Faster decoding with no draft model and no training.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo)
app.command("replay")(replay_command)
app.command("measure-cost")(measure_cost)
app.add_typer(index_app, name="index")


def main() -> None:
    """Run the command line; an error of ours is one line on stderr and exit status 1."""
    try:
        app()
    except BrokenPipeError:
        # Whoever read our output has gone.
        sys.exit(1)
    except (FreedraftError, ImportError, OSError) as error:
        # A Text, for in a message that quotes a user's path square brackets are no markup.
        Console(stderr=True).print(Text("error: ", "bold red") + Text(str(error), ""), soft_wrap=True)
        sys.exit(1)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"freedraft {version('freedraft')}")
        raise typer.Exit


@app.callback()
def _root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def drafters(
    name: Annotated[str | None, typer.Argument(help="Only this one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """List the installed drafters, ours and others', with their settings."""
    # Not at the top, so that other commands need not load what drafters need.
    from freedraft.integrations.describe import describe_drafter
    from freedraft.plugins.registry import drafter_names

    _show({one: describe_drafter(one) for one in ([name] if name else drafter_names())}, as_json)


@app.command()
def sections(
    name: Annotated[str | None, typer.Argument(help="Only this one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """List the sections of a configuration that belong to no drafter, with their settings."""
    from freedraft.integrations.describe import describe_section
    from freedraft.integrations.sections import SECTIONS

    if name is not None and name not in SECTIONS:
        raise ConfigError(f"no section {name}; expected one of {', '.join(SECTIONS)}")
    _show({one: describe_section(one) for one in ([name] if name else SECTIONS)}, as_json)


def _show(described: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(described, indent=1))
        return
    console = Console() if sys.stdout.isatty() else Console(width=120)
    for one, what in described.items():
        title = Text(f"{one}: {what['summary']}", "bold")
        table = Table(title=title, title_justify="left", expand=True)
        table.add_column("setting", no_wrap=True)
        table.add_column("default", no_wrap=True)
        table.add_column("what it is")
        for setting, values in what["settings"].items():
            table.add_row(setting, Text(str(values["default"])), Text(values["description"]))
        console.print(table)


if __name__ == "__main__":
    main()
