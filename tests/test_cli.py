"""The command line: help, listing, versions, and errors in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version

import pytest
from typer.testing import CliRunner

from freedraft.integrations import cli
from freedraft.plugins.config import SECTIONS
from freedraft.plugins.registry import drafter_names
from freedraft.retrieval.errors import ConfigError


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], catch_exceptions=False)


def test_version():
    assert run("--version").output.strip() == f"freedraft {version('freedraft')}"


def test_no_command_shows_help():
    for arguments in ((), ("--help",), ("-h",)):
        assert "demo" in run(*arguments).output


def test_drafters_lists_every_one_with_its_settings():
    listed = json.loads(run("drafters", "--json").output)
    assert sorted(listed) == drafter_names()
    lookup = listed["prompt_lookup"]["settings"]
    assert lookup["max_match"]["default"] == 5
    for drafter in listed.values():
        assert drafter["summary"].endswith(".")
        for setting, values in drafter["settings"].items():
            assert values["description"], f"{setting} is not described"


def test_drafters_prints_a_table():
    output = run("drafters", "prompt_lookup").output
    assert "max_match" in output
    assert "suffix_automaton" not in output


def test_sections_lists_every_one_with_its_settings():
    listed = json.loads(run("sections", "--json").output)
    assert tuple(listed) == SECTIONS
    assert listed["pacing"]["settings"]["explore"]["default"] == 100
    for section in listed.values():
        assert section["summary"].startswith("Settings of ")
        assert all(values["description"] for values in section["settings"].values())


def test_sections_prints_a_table_of_one():
    output = run("sections", "vllm").output
    assert "log_interval" in output
    assert "explore" not in output
    with pytest.raises(ConfigError, match="no section generat; expected one of generate, gpu, pacing, vllm"):
        run("sections", "generat")


def test_an_error_is_one_line_and_status_1(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["freedraft", "drafters", "prompt_lokup"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert "did you mean prompt_lookup?" in printed.err


@pytest.mark.parametrize("name", ["[/x]", "[bold]x[/bold]"])
def test_square_brackets_are_no_markup(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["freedraft", "drafters", name])
    with pytest.raises(SystemExit):
        cli.main()
    assert name in capsys.readouterr().err


def test_the_installed_command_runs_without_a_terminal():
    ran = subprocess.run(
        [sys.executable, "-m", "freedraft.integrations.cli", "--version"], capture_output=True, text=True
    )
    assert ran.stdout.strip() == f"freedraft {version('freedraft')}"
