"""`freedraft index`: what a person and a program read, exit statuses, and errors of one line."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console
from tiny_tokenizer import make_tokenizer
from typer.testing import CliRunner

from freedraft.integrations import cli
from freedraft.retrieval import cli as index_cli
from freedraft.retrieval import query
from freedraft.retrieval.errors import InputError
from freedraft.retrieval.index.continuation import ESCAPE
from freedraft.retrieval.index.errors import CorpusIndexError, DamagedError, ManifestError, SourceError

CHAT = [{"role": "user", "content": "what is it"}, {"role": "assistant", "content": "it is the cat"}]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a tokenizer and two texts, and nothing else."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    make_tokenizer(tmp_path / "tok")
    (tmp_path / "src").mkdir()
    (tmp_path / "src/a.txt").write_text("the cat sat on the mat")
    (tmp_path / "src/b.txt").write_text("the cat is not on the dog")
    return tmp_path


def run(*arguments, stdin=None, status=0):
    """Standard output of `freedraft index ...`, run in this process."""
    result = CliRunner().invoke(cli.app, ["index", *map(str, arguments)], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result.stdout


def run_json(*arguments, stdin=None):
    return json.loads(run(*arguments, "--json", stdin=stdin))


def build(*sources, index="i", **kwargs):
    return run("build", index, *(sources or ("src",)), "--tokenizer", "tok", **kwargs)


def names(index="i"):
    return run_json("info", index, "--documents")


def one_line_error(monkeypatch, capsys, *arguments):
    """What `freedraft index ...` prints on stderr when it fails."""
    monkeypatch.setattr(sys, "argv", ["freedraft", "index", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    said = capsys.readouterr()
    assert stopped.value.code == 1
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    return said.err[7:-1]


class TestBuild:
    def test_says_what_was_built(self, here):
        said = build()
        assert re.search(r"^built i: 2 documents, \d+ tokens, in \d+\.\d s \([\d,]+ tokens/s\)$", said, re.MULTILINE)
        assert re.search(
            r"^the index: 2 documents, \d+ tokens, 1 segment, .*B \(\d+\.\d a token\)$", said, re.MULTILINE
        )
        assert names() == ["src/a.txt", "src/b.txt"]

    def test_json(self, here):
        report = json.loads(build("src", "--json"))
        assert report["added"]["documents"] == report["index"]["documents"] == 2
        assert report["added"]["problems"] == []
        assert report["index"]["tokenizer"]["name"] == str(here / "tok")
        assert report["index"]["sources"] == [str(here / "src")]
        assert report["index"]["bytes"] > 0

    def test_nothing_on_stderr_where_there_is_no_terminal(self, here):
        result = CliRunner().invoke(cli.app, ["index", "build", "i", "src", "--tokenizer", "tok"])
        assert result.exit_code == 0
        assert result.stderr == ""

    def test_problems_go_to_stderr_with_file_and_line(self, here):
        (here / "c.jsonl").write_text('{"text": "the dog"}\n{\n{"txt": 1}\n')
        result = CliRunner().invoke(cli.app, ["index", "build", "i", "c.jsonl", "--tokenizer", "tok"])
        assert result.exit_code == 0
        assert "skipped 1 broken JSON line:\n  c.jsonl:2: not valid JSON" in result.stderr
        assert "skipped 1 record without the field:\n  c.jsonl:3: no field 'text'; there are: txt" in result.stderr
        with pytest.raises(SourceError, match=r"^c\.jsonl:2: "):
            run("build", "j", "c.jsonl", "--tokenizer", "tok", "--strict")

    def test_standard_input(self, here):
        build("-", stdin="the cat sat")
        assert names() == ["stdin"]
        run("append", "i", "-", "--format", "jsonl", "--field", "body", stdin='{"body": "the dog"}\n')
        assert names() == ["stdin", "stdin:1"]

    def test_chats(self, here):
        (here / "chat.jsonl").write_text(json.dumps({"messages": CHAT}))
        build("chat.jsonl", "--field", "messages")
        assert run_json("query", "i", "it is the ")["draft_text"] == "cat"
        assert run_json("query", "i", "what is")["draft"][0]["context"] < 3
        build("chat.jsonl", "--field", "messages", "--chat", "all", index="all")
        assert run_json("query", "all", "what is", "--tokens", "5")["draft_text"].startswith(" it<|end|><|assistant|>")

    def test_folders(self, here):
        (here / "src/c.py").write_text("import it")
        (here / "src/.gitignore").write_text("b.*\n")
        build("src", "--exclude", ".gitignore")
        assert names() == ["src/a.txt", "src/c.py"]
        build("src", "--include", "*.py", "--replace")
        assert names() == ["src/c.py"]

    def test_dedup_and_min_count_stay_with_the_index(self, here):
        (here / "c.txt").write_text("the cat sat on the mat")
        said = build("src", "c.txt", "--dedup", "--min-count", "2")
        assert "1 duplicates left out" in said
        run("append", "i", "c.txt")
        described = run_json("info", "i")
        assert (described["documents"], described["dedup"], described["min_count"]) == (2, True, 2)
        assert "--min-count 2 --dedup" in run("info", "i")

    def test_how_the_sources_were_read_is_shown(self, here):
        build()
        assert "--format auto --field text --chat replies\n" in run("info", "i")
        reading = {"format": "auto", "field": "text", "chat": "replies", "include": [], "exclude": []}
        assert run_json("info", "i")["reading"] == reading
        build(
            "src",
            "--replace",
            "--field",
            "a.b",
            "--include",
            "*.txt",
            "--include",
            "a b",
            "--exclude",
            "\x1b",
            "--chat",
            "all",
        )
        line = r"--format auto --field a.b --chat all --include '*.txt' --include 'a b' --exclude '\x1b'"
        assert f"{line}\n" in run("info", "i")

    def test_an_append_that_reads_otherwise_says_so_in_a_line(self, here):
        (here / "chat.jsonl").write_text(json.dumps({"messages": CHAT}))
        options = ("--field", "messages", "--include", "*.jsonl")
        build("chat.jsonl", *options)

        def said_of(*arguments):
            result = CliRunner().invoke(cli.app, ["index", "append", "i", *arguments])
            assert result.exit_code == 0
            return result.stderr

        assert said_of("src") == (
            "the index was built with --field messages, --include '*.jsonl'; "
            "this append reads with --field text, no --include\n"
        )
        assert said_of("chat.jsonl", *options) == ""
        assert said_of("chat.jsonl", *options, "--exclude", "b*") == (
            "the index was built with no --exclude; this append reads with --exclude 'b*'\n"
        )
        # An index of before this was recorded.
        manifest = json.loads((here / "i/manifest.json").read_text())
        del manifest["reading"]
        (here / "i/manifest.json").write_text(json.dumps(manifest))
        assert said_of("src") == ""
        assert "read with" not in run("info", "i")
        assert run_json("info", "i")["reading"] is None

    def test_an_index_is_no_source_of_itself(self, here, monkeypatch, capsys):
        build("src", index="src/i")
        run("append", "src/i", "src")
        assert names("src/i") == ["src/a.txt", "src/b.txt"] * 2
        said = one_line_error(monkeypatch, capsys, "append", "src/i", "src/../src/i")
        assert "the index itself" in said

    def test_usage_errors(self, here):
        run("build", "i", "src", status=2)
        run("build", "i", "--tokenizer", "tok", status=2)
        run("build", "i", "src", "--tokenizer", "tok", "--min-count", "0", status=2)
        run("build", "i", "src", "--tokenizer", "tok", "--format", "xml", status=2)


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["build", "i", "nowhere", "--tokenizer", "tok"], "nowhere: no such file or folder"),
            (["build", "i", "src", "--tokenizer", "none"], "neither a folder nor a file"),
            (["build", "i", "src", "--tokenizer", "tok", "--max-memory", "1MB"], "is too little: at least"),
            (["build", "i", "src", "--tokenizer", "tok", "--max-memory", "much"], "expected a size like"),
            (["build", "tok/tokenizer.json", "src", "--tokenizer", "tok"], "a file is in the way"),
            (["build", "tok/tokenizer.json/i", "src", "--tokenizer", "tok"], "a file is in the way"),
            (["info", "none"], "none"),
            (["query", "none", "x"], "none"),
            (["append", "none", "src"], "none"),
            (["delete", "none", "--document", "x"], "none"),
            (["merge", "none"], "none"),
            (["verify", "none"], "none"),
        ],
    )
    def test_one_line_and_status_1(self, here, monkeypatch, capsys, arguments, message):
        assert message in one_line_error(monkeypatch, capsys, *arguments)

    def test_a_missing_package_is_named_with_the_extra(self, here, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "pathspec", None)
        said = one_line_error(monkeypatch, capsys, "build", "i", "src", "--tokenizer", "tok")
        assert said.endswith("needs pathspec, which is not installed: pip install 'freedraft[index]'")

    def test_an_index_in_the_way(self, here, monkeypatch, capsys):
        build()
        said = one_line_error(monkeypatch, capsys, "build", "i", "src", "--tokenizer", "tok")
        assert "append adds to it" in said

    def test_another_tokenizer(self, here, monkeypatch, capsys):
        build()
        make_tokenizer(here / "other", ("zebra",))
        for command in (["append", "i", "src"], ["query", "i", "x"]):
            said = one_line_error(monkeypatch, capsys, *command, "--tokenizer", "other")
            assert str(here / "tok") in said
            assert str(here / "other") in said


class TestChange:
    def test_append_delete_merge(self, here):
        build("src/a.txt")
        assert "added to i: 1 documents" in run("append", "i", "src/b.txt")
        assert names() == ["src/a.txt", "src/b.txt"]
        assert run_json("query", "i", "the cat ")["match"]["count"] == 2
        run("delete", "i", "--document", "src/b.txt")
        assert names() == ["src/a.txt"]
        answer = run_json("query", "i", "the cat ")
        assert (answer["match"]["count"], [d["name"] for d in answer["documents"]]) == (1, ["src/a.txt"])
        before_and_after = run_json("merge", "i")
        assert before_and_after["after"]["documents"] == 1
        assert before_and_after["after"]["segments"] == 1
        with pytest.raises(InputError, match="too little"):
            run("merge", "i", "--max-memory", "1MB")
        assert run_json("query", "i", "the cat ")["draft_text"].startswith("sat")
        run("verify", "i")

    def test_delete_stays_within_its_memory(self, here, monkeypatch):
        (here / "src/c.txt").write_text("the mat")
        build()
        with pytest.raises(InputError, match="too little"):
            run("delete", "i", "--document", "src/c.txt", "--max-memory", "1MB")
        monkeypatch.setattr(index_cli, "segment_tokens", lambda memory, workers: memory // 10**6)
        after = run_json("delete", "i", "--document", "src/c.txt", "--max-memory", "20MB")["after"]
        assert (after["documents"], after["segments"]) == (2, 2)

    def test_progress_on_a_terminal(self, here, monkeypatch):
        build("src/a.txt")
        run("append", "i", "src/b.txt")
        seen = io.StringIO()
        terminal = Console(file=seen, force_terminal=True, width=160, color_system=None)
        monkeypatch.setattr(index_cli, "Console", lambda stderr: terminal)
        for command in (["verify"], ["merge"], ["delete", "--document", "src/b.txt"]):
            run(command[0], "i", *command[1:])
        for what in ("checking", "merging", "writing anew what holds them"):
            assert re.search(rf"{what} .* 100% [\d,]+ tokens, [\d,]+/s 0:00:0\d 0:00:00", seen.getvalue())

    def test_deleting_what_is_not_there(self, here):
        build()
        with pytest.raises(InputError, match=r"src/c\.txt"):
            run("delete", "i", "--document", "src/c.txt")
        assert len(names()) == 2

    def test_deleting_by_a_name_as_it_is_listed(self, here):
        (here / "src/c\nd.txt").write_text("the mat")
        build()
        listed = run("info", "i", "--documents").splitlines()
        assert listed[2] == r"src/c\nd.txt"
        run("delete", "i", "--document", listed[2], "--document", listed[0])
        assert names() == ["src/b.txt"]


class TestQuery:
    def test_what_would_be_drafted_and_why(self, here):
        build()
        answer = run_json("query", "i", "for,the ", "--tokens", "4")
        documents = [{"name": "src/a.txt", "count": 2}, {"name": "src/b.txt", "count": 2}]
        of_documents = {"documents": documents, "documents_in_all": 2, "documents_are_all": True}
        assert answer["match"] == {"tokens": 2, "text": "the ", "count": 4, **of_documents}
        assert answer["start"] == {"tokens": 2, "text": "the "}
        assert {key: answer[key] for key in of_documents} == of_documents
        assert [(c["text"], c["count"], c["share"]) for c in answer["continuations"]] == [
            ("cat", 2, 0.5), ("dog", 1, 0.25), ("mat", 1, 0.25),
        ]  # fmt: skip
        assert answer["draft"][0] == {
            "token": answer["continuations"][0]["token"],
            "text": "cat",
            "context": 2,
            "count": 2,
            "of": 4,
            "probability": 2 / (4 + ESCAPE / 2),
        }
        assert len(answer["draft"]) == 4

    def test_the_documents_are_those_that_the_draft_comes_from(self, here):
        # After the match, "on the ", "dog" came once; after " the " it was "cat" six times of seven.
        (here / "src/a.txt").write_text("on the dog")
        (here / "src/b.txt").write_text("if the cat, if the cat, if the cat, if the cat, if the cat, if the cat.")
        build()
        answer = run_json("query", "i", "on the ")
        assert (answer["match"]["text"], answer["start"]["text"]) == ("on the ", " the ")
        assert answer["draft"][0]["context"] == answer["start"]["tokens"] == 3
        assert answer["documents"] == [{"name": "src/b.txt", "count": 6}, {"name": "src/a.txt", "count": 1}]
        assert answer["match"]["documents"] == [{"name": "src/a.txt", "count": 1}]
        said = run("query", "i", "on the ")
        assert said.endswith(
            'documents with the last 3 tokens, which the draft starts from: " the ":\n'
            "  src/b.txt (6 times)\n  src/a.txt (once)\n"
            "documents with the match, which is longer:\n  src/a.txt (once)\n"
        )

    def test_for_people(self, here):
        build()
        said = run("query", "i", "for,the ", "--top", "1")
        assert 'match: the last 2 of 4 tokens, seen 4 times: "the "' in said
        assert 'draft: "cat ' in said
        assert re.search(r'"cat" *│ *2 tokens │ 2 of 4 │ *0\.250', said)
        assert re.search(r"token *┃ text *┃ count ┃ share", said)
        assert "documents with the match:\n  src/a.txt (2 times)\n  and 1 more\n" in said

    def test_nothing_known(self, here):
        build()
        assert "nothing would be drafted" in run("query", "i", "zzz")
        answer = run_json("query", "i", "zzz")
        assert answer["match"]["tokens"] == 0
        assert answer["draft"] == answer["documents"] == answer["continuations"] == []
        assert answer["start"] == {"tokens": 0, "text": ""}

    def test_standard_input_and_markup(self, here):
        (here / "c.txt").write_text("[bold] [/red] the [dog]")
        build("c.txt")
        assert '"[bold] [/red]"' in run("query", "i", "-", stdin="[bold] [/red]")

    def test_more_places_than_are_looked_at(self, here, monkeypatch):
        build()
        assert run_json("query", "i", "the ")["documents_are_all"] is True
        monkeypatch.setattr(query, "OCCURRENCES_LOOKED_AT", 2)
        answer = run_json("query", "i", "the ")
        assert answer["documents"] == [{"name": "src/a.txt", "count": 2}]
        assert answer["documents_are_all"] is False
        assert re.search(
            r"documents with the match, of its first [\d,]+ places in each segment:", run("query", "i", "the ")
        )

    def test_a_name_cannot_talk_to_the_terminal(self, here):
        (here / "src/\x1b[31m.txt").write_text("for the dog")
        build()
        for said in (run("info", "i", "--documents"), run("query", "i", "for the ")):
            assert "\x1b" not in said
            assert r"src/\x1b[31m.txt" in said
        assert "src/\x1b[31m.txt" in names()

    def test_text_that_is_not_utf8(self, here):
        build()
        with pytest.raises(InputError, match="not UTF-8, at character 4"):
            run("query", "i", "the \udcff")

    def test_ids(self, here):
        np.save(here / "a.npy", np.array([7, 8, 9, 7, 8, 9]))
        build("a.npy")
        (here / "tok").rename(here / "moved")
        answer = run_json("query", "i", "1, 7 8", "--ids", "--tokens", "2")
        assert [one["token"] for one in answer["draft"]] == [9, 7]
        assert answer["draft_text"] is None
        assert "│ 9" in run("query", "i", "7 8", "--ids")
        with pytest.raises(SourceError, match="give --tokenizer"):
            run("query", "i", "x")
        with pytest.raises(ValueError, match="expected token ids"):
            run("query", "i", "seven", "--ids")


class TestVerify:
    def test_sound(self, here):
        build()
        assert "i is sound: 2 documents" in run("verify", "i")
        assert run_json("verify", "i")["sound"] is True

    def test_damaged(self, here):
        build()
        path = next((here / "i").glob("*.segment"))
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        with pytest.raises(CorpusIndexError, match="checksum"):
            run("verify", "i")
        done = CliRunner().invoke(cli.app, ["index", "verify", "i", "--json"])
        told = json.loads(done.stdout)
        assert (told["sound"], told["error"]) == (False, "ChecksumError")
        assert isinstance(done.exception, CorpusIndexError)

    def test_token_ids_that_the_tokenizer_does_not_have(self, here):
        np.save(here / "a.npy", np.array([7, 8, 9, 7, 8, 9]))
        build("a.npy")
        manifest = json.loads((here / "i/manifest.json").read_text())
        manifest["tokenizer"]["vocabulary_size"] = 9
        (here / "i/manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(DamagedError, match=r"token id 9 is not one of 0\.\.8"):
            run("verify", "i")

    def test_gone(self, here):
        build()
        next((here / "i").glob("*.segment")).unlink()
        with pytest.raises(ManifestError):
            run("info", "i")


def test_help_teaches():
    said = run("--help")
    for command in ("build", "append", "merge", "delete", "info", "query", "verify"):
        assert command in said
        assert len(run(command, "--help").splitlines()) > 10
    assert "freedraft index build" in run("build", "--help")


def test_as_a_process(here):
    """The entry point itself: exit status, one line on stderr, nothing else."""
    code = "from freedraft.integrations.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "index", "info", "none"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_another_programs_manifest_is_left_alone(here, monkeypatch, capsys):
    (here / "web").mkdir()
    (here / "web/manifest.json").write_text('{"name": "my web app"}')
    for more in ([], ["--replace"]):
        said = one_line_error(monkeypatch, capsys, "build", "web", "src", "--tokenizer", "tok", *more)
        assert "its manifest.json is not an index's" in said
    assert (here / "web/manifest.json").read_text() == '{"name": "my web app"}'


def test_what_the_system_refuses_is_one_line(here, monkeypatch, capsys):
    for index in ("src/a.txt", "src/a.txt/below"):
        assert "src/a.txt" in one_line_error(monkeypatch, capsys, "build", index, "src", "--tokenizer", "tok")
