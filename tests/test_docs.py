"""What the documents say is so: their code runs, their links lead somewhere, their commands and settings exist."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
import tiny

from freedraft.integrations.cli import app
from freedraft.integrations.hf import Speculative
from freedraft.plugins.config import parse_config
from freedraft.plugins.registry import drafter_from_config

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def blocks(document, language):
    """The fenced code blocks of a document, without their indentation."""
    text = document.read_text()
    for found in re.finditer(rf"^( *)```{language}\n(.*?)^ *```", text, re.M | re.S):
        yield re.sub(rf"^{found[1]}", "", found[2], flags=re.M)


def test_the_recipe_for_a_drafter_makes_one():
    code = next(block for block in blocks(ROOT / "CONTRIBUTING.md", "python") if "class Echo:" in block)
    module = types.ModuleType("echo_of_the_recipe")
    sys.modules[module.__name__] = module
    try:
        exec(compile(code, "CONTRIBUTING.md", "exec"), module.__dict__)
        ours = Speculative(module.Echo(module.EchoSettings(max_tokens=3)))
        model, prompt = tiny.model(), tiny.prompt(6)
        plain = model.generate(prompt, max_new_tokens=20, do_sample=False)
        assert model.generate(prompt, max_new_tokens=20, do_sample=False, custom_generate=ours).equal(plain)
        assert ours.statistics.drafted > 0
        assert ours.statistics.drafter_errors == 0
    finally:
        del sys.modules[module.__name__]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_blocks_are_python(document):
    for block in blocks(document, "python"):
        compile(block, str(document), "exec")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(document):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_configurations_are_accepted(document, tmp_path):
    for i, block in enumerate(blocks(document, "yaml")):
        path = tmp_path / f"{i}.yaml"
        path.write_text(block)
        config = parse_config(path)
        if "index" not in config.settings:
            drafter_from_config(config)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_exist(document):
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    commands |= {group.name for group in app.registered_groups}
    text = "\n".join([*blocks(document, "bash"), *blocks(document, "console")])
    for name in re.findall(r"^(?:\$ )?freedraft (\w[\w-]*)", text, re.M):
        assert name in commands


@pytest.mark.parametrize("document", [*DOCUMENTS, *sorted((ROOT / "bench").glob("*.md"))], ids=lambda path: path.name)
def test_tables_are_whole(document):
    """Behind a blank line, or without its second line, the rows of a table are shown as text."""
    lines = ["", *document.read_text().splitlines(), ""]
    for before, line, after in zip(lines, lines[1:], lines[2:], strict=False):
        if line.startswith("|") and not before.startswith("|"):
            assert re.fullmatch(r"[|:\- ]+", after), line


def test_no_document_is_missing_from_the_readme():
    readme = (ROOT / "README.md").read_text()
    for document in DOCUMENTS:
        if document.name != "README.md":
            assert str(document.relative_to(ROOT)) in readme


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_nothing_is_left_to_fill_in(document):
    assert not re.findall(r"\b[A-Z]+_(?:TABLE|SECTION|VERSIONS)\b|\bTODO\b|\bFIXME\b|\bXXX\b", document.read_text())
