"""Sources: what each kind of file gives, what is skipped, where it says so, and that nothing else is lost."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizer import make_tokenizer

from freedraft.retrieval.build import streams, texts, token_files
from freedraft.retrieval.build.chat import ChatTemplate, load_chat_template
from freedraft.retrieval.build.problems import ProblemKind, Problems
from freedraft.retrieval.build.sources import Format, SourceOptions, Sources
from freedraft.retrieval.build.tokenize import Tokenizer
from freedraft.retrieval.index.errors import MissingPackageError, SourceError

CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "the cat"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "the mat"},
]


def template():
    return ChatTemplate(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}", {"eos_token": "#"}
    )


def read(*paths, strict=False, vocabulary_size=1000, chat_template=template, **options):
    """All documents as (name, text or list of ids), and the problems."""
    problems = Problems(strict)
    reader = Sources([str(p) for p in paths], SourceOptions(**options), problems, vocabulary_size, chat_template)
    found = [(name, content if isinstance(content, str) else content.tolist()) for name, content in reader]
    return found, problems


def counts(problems):
    return {kind.name: count for kind, count in problems.counts.items()}


@pytest.fixture
def make(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return name

    return write


class TestText:
    def test_a_file_is_a_document(self, make):
        text = "the cat\nsat, naïve\r\n\nno end"
        found, problems = read(make("a.txt", text))
        assert found == [("a.txt", text)]
        assert not problems

    def test_empty_file_gives_nothing(self, make):
        assert read(make("a.txt", ""))[0] == []

    def test_byte_order_mark_is_not_text(self, make):
        assert read(make("a.txt", b"\xef\xbb\xbfthe"))[0] == [("a.txt", "the")]

    def test_undecodable_lines_are_left_out_and_nothing_joins_over_the_gap(self, make):
        content = b"one\ntwo\ncaf\xe9\nfour\n\xff\xfe\nsix"
        found, problems = read(make("a.txt", content))
        assert found == [("a.txt", "one\ntwo\n"), ("a.txt", "four\n"), ("a.txt", "six")]
        assert counts(problems) == {"UNDECODABLE": 2}
        assert [message.partition(": ")[0] for message in problems.first[ProblemKind.UNDECODABLE]] == [
            "a.txt:3",
            "a.txt:5",
        ]

    def test_character_cut_at_the_end(self, make):
        found, problems = read(make("a.txt", "one\nnaï".encode()[:-1]))
        assert found == [("a.txt", "one\n")]
        assert problems.first[ProblemKind.UNDECODABLE] == ["a.txt:2: not valid UTF-8: unexpected end of data"]

    def test_long_texts_come_in_pieces_of_whole_lines(self, make, monkeypatch):
        monkeypatch.setattr(texts, "PIECE_CHARACTERS", 50)
        text = "".join(f"line {i} ä\n" for i in range(100))
        found, _ = read(make("a.txt", text))
        assert "".join(piece for _, piece in found) == text
        assert len(found) > 10
        assert all(name == "a.txt" and len(piece) < 100 and piece.endswith("\n") for name, piece in found)

    def test_one_long_line_loses_nothing(self, make, monkeypatch):
        monkeypatch.setattr(texts, "PIECE_CHARACTERS", 7)
        text = "äöüß€𝄞" * 50
        found, problems = read(make("a.txt", text))
        assert "".join(piece for _, piece in found) == text
        assert not problems

    def test_binary_is_skipped(self, make):
        found, problems = read(make("a.bin", b"\x7fELF\0\0the cat"), make("b.txt", "the dog"))
        assert found == [("b.txt", "the dog")]
        assert counts(problems) == {"BINARY": 1}

    @given(st.text(alphabet="ab\n\rä€𝄞", max_size=200), st.integers(1, 40))
    def test_cut_keeps_every_character(self, text, size):
        before = texts.PIECE_CHARACTERS
        texts.PIECE_CHARACTERS = size
        try:
            pieces = list(texts.cut(text))
        finally:
            texts.PIECE_CHARACTERS = before
        assert "".join(pieces) == text
        assert all(0 < len(piece) <= size for piece in pieces)


class TestPacked:
    @pytest.mark.parametrize("suffix", [".gz", ".zst", ""])
    def test_gzip_and_zstd_are_unpacked_whatever_the_name(self, make, suffix):
        text = "the cat sat\n" * 20_000
        for pack in (gzip.compress, zstandard.ZstdCompressor().compress):
            assert read(make(f"a.txt{suffix}", pack(text.encode())))[0] == [(f"a.txt{suffix}", text)]

    def test_the_inner_suffix_decides(self, make):
        content = gzip.compress(b'{"text": "the cat"}\n')
        assert read(make("a.jsonl.gz", content))[0] == [("a.jsonl.gz:1", "the cat")]

    def test_several_frames_and_skippable_ones(self, make):
        skippable = b"\x50\x2a\x4d\x18\x04\0\0\0abcd"
        pack = zstandard.ZstdCompressor().compress
        assert read(make("a.zst", skippable + pack(b"the ") + pack(b"cat")))[0] == [("a.zst", "the cat")]
        assert read(make("a.gz", gzip.compress(b"the ") + gzip.compress(b"cat")))[0] == [("a.gz", "the cat")]

    @pytest.mark.parametrize(
        "pack", [gzip.compress, zstandard.ZstdCompressor(write_checksum=True).compress], ids=["gzip", "zstd"]
    )
    def test_cut_short_or_damaged_is_reported(self, make, pack):
        lines = "".join(json.dumps({"text": f"{random.Random(i).getrandbits(99)}"}) + "\n" for i in range(30_000))
        whole = pack(lines.encode())
        noise = bytes(random.Random(0).randrange(256) for _ in range(99))
        for content in (whole[: len(whole) // 2], whole[:-5], whole[:9000] + noise + whole[9099:]):
            found, problems = read(make("a.jsonl", content))
            assert problems.counts[ProblemKind.DAMAGED] == 1
            assert all(text == f"{random.Random(i).getrandbits(99)}" for i, (_, text) in enumerate(found[:20]))
            with pytest.raises(SourceError, match=r"a\.jsonl"):
                read("a.jsonl", strict=True)

    def test_bytes_read_are_those_on_disk(self, make):
        content = gzip.compress(b"the cat\n" * 50_000)
        seen = []
        reader = Sources([make("a.gz", content), make("b", "x")], SourceOptions(), Problems(), 9, template, seen.append)
        assert reader.total_bytes() == len(content) + 1
        assert len(list(reader)) == 2
        assert sum(seen) == len(content) + 1


class TestJsonLines:
    def test_text_and_empty_lines(self, make):
        content = '{"text": "the cat"}\n\n  \n{"text": "naïve", "n": 1}\r\n{"text": ""}\n{"text": "end"}'
        assert read(make("a.jsonl", content))[0] == [
            ("a.jsonl:1", "the cat"), ("a.jsonl:4", "naïve"), ("a.jsonl:6", "end"),
        ]  # fmt: skip

    def test_fields_by_path(self, make):
        record = {"response": {"choices": [{"message": {"content": "deep"}}]}, "a.b": "literal", "a": {"b": "nested"}}
        make("a.jsonl", json.dumps(record))
        assert read("a.jsonl", field="response.choices.0.message.content")[0] == [("a.jsonl:1", "deep")]
        assert read("a.jsonl", field="a.b")[0] == [("a.jsonl:1", "literal")]
        for field in ("response.choices.1.message", "response.choices.x", "response.choices.-1", "b", "a.b.c"):
            assert counts(read("a.jsonl", field=field)[1]) == {"MISSING_FIELD": 1}

    BAD = (
        ('{"text": "cut', "BROKEN_JSON"),
        ("[" * 100_000, "BROKEN_JSON"),
        ("9" * 5000, "BROKEN_JSON"),
        ('{"txt": "other"}', "MISSING_FIELD"),
        ('{"text": null}', "MISSING_FIELD"),
        ('["text"]', "MISSING_FIELD"),
        ("3", "MISSING_FIELD"),
        ('{"text": 3}', "WRONG_VALUE"),
        ('{"text": {"a": "b"}}', "WRONG_VALUE"),
        ('{"text": "half \\ud83d pair"}', "WRONG_VALUE"),
        ('{"text": [true, false]}', "WRONG_VALUE"),
        ('{"text": [1, 1000]}', "WRONG_VALUE"),
        ('{"text": [-1]}', "WRONG_VALUE"),
        (b'{"text": "caf\xe9"}', "UNDECODABLE"),
    )

    @pytest.mark.parametrize(("line", "kind"), BAD, ids=[f"{kind}-{i}" for i, (_, kind) in enumerate(BAD)])
    def test_bad_lines_are_counted_and_skipped_and_strict_stops(self, make, line, kind):
        line = line if isinstance(line, bytes) else line.encode()
        make("a.jsonl", b'{"text": "one"}\n' + line + b'\n{"text": "three"}\n')
        found, problems = read("a.jsonl")
        assert found == [("a.jsonl:1", "one"), ("a.jsonl:3", "three")]
        assert counts(problems) == {kind: 1}
        assert problems.first[ProblemKind[kind]][0].startswith("a.jsonl:2: ")
        with pytest.raises(SourceError, match=r"^a\.jsonl:2: "):
            read("a.jsonl", strict=True)

    def test_only_the_first_places_are_listed(self, make):
        make("a.jsonl", "{\n" * 10)
        _, problems = read("a.jsonl")
        assert len(problems.first[ProblemKind.BROKEN_JSON]) == 3
        lines = problems.lines()
        assert lines[0] == "skipped 10 broken JSON lines:"
        assert lines[-1] == "  and 7 more"
        assert problems.as_json()[0]["count"] == 10

    def test_overlong_line_is_passed_over(self):
        stream = io.BytesIO(b"a\n" + b"b" * 25 + b"\nc\n" + b"d" * 9)
        assert list(streams.lines_of(stream, 10)) == [(1, b"a\n"), (2, None), (3, b"c\n"), (4, b"d" * 9)]

    def test_line_of_exactly_the_limit(self):
        assert list(streams.lines_of(io.BytesIO(b"123456789\nx"), 10)) == [(1, b"123456789\n"), (2, b"x")]

    def test_token_ids(self, make):
        assert read(make("a.jsonl", '{"ids": [1, 2, 999]}'), field="ids")[0] == [("a.jsonl:1", [1, 2, 999])]

    def test_other_names_by_format(self, make):
        assert read(make("log", '{"text": "x"}'), format=Format.JSONL)[0] == [("log:1", "x")]
        assert read(make("a.jsonl", "x"), format=Format.TEXT)[0] == [("a.jsonl", "x")]


class TestChats:
    def test_replies_only(self, make):
        found, _ = read(make("a.jsonl", json.dumps({"messages": CHAT})), field="messages")
        assert found == [("a.jsonl:1", "the cat"), ("a.jsonl:1", "the mat")]

    def test_all(self, make):
        found, _ = read(make("a.jsonl", json.dumps({"messages": CHAT})), field="messages", chat="all")
        assert found == [
            ("a.jsonl:1", "[system]be brief#[user]hi#[assistant]the cat#[user]more#[assistant]the mat#")
        ]  # fmt: skip

    def test_share_gpt_names_and_parts(self, make):
        chat = [
            {"from": "human", "value": "hi"},
            {"from": "gpt", "value": [{"type": "text", "text": "the "}, {"type": "image"}, {"text": "cat"}]},
        ]
        assert read(make("a.jsonl", json.dumps({"c": chat})), field="c")[0] == [("a.jsonl:1", "the cat")]

    @pytest.mark.parametrize("chat", [["hi"], [{"content": "x"}], [{"role": 3}], [{"role": "user", "content": 3}]])
    def test_bad_messages(self, make, chat):
        found, problems = read(make("a.jsonl", json.dumps({"m": chat})), field="m")
        assert (found, counts(problems)) == ([], {"WRONG_VALUE": 1})

    def test_no_reply_or_no_message_gives_nothing(self, make):
        lines = [{"m": []}, {"m": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None}]}]
        assert read(make("a.jsonl", "\n".join(map(json.dumps, lines))), field="m")[0] == []

    def test_template_refusal_is_a_problem_of_the_record(self, make):
        refusing = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
        make("a.jsonl", json.dumps({"m": CHAT}))
        _, problems = read("a.jsonl", field="m", chat="all", chat_template=lambda: refusing)
        assert "roles must alternate" in problems.first[ProblemKind.WRONG_VALUE][0]

    def test_templates_cannot_reach_the_interpreter(self):
        evil = ChatTemplate("{{ messages.__class__.__mro__[1].__subclasses__() }}", {})
        with pytest.raises(ValueError, match="unsafe"):
            evil.render(CHAT)

    def test_what_templates_use(self):
        source = (
            "{%- for m in messages %}\n    {%- if loop.index > 1 %}{% break %}{% endif %}\n"
            "    {% generation %}\n{{ m | tojson }}{{ tools is none }}{{ strftime_now('%%') }}\n"
            "    {% endgeneration %}\n"
            "{%- endfor %}"
        )
        assert ChatTemplate(source, {}).render([{"role": "user", "content": "<é>"}]) == (
            '{"role": "user", "content": "<é>"}True%\n'
        )

    def test_template_from_the_tokenizers_folder(self, tmp_path):
        folder = make_tokenizer(tmp_path / "t")
        assert load_chat_template(folder).render(CHAT[1:3]) == "<|user|>hi<|end|><|assistant|>the cat<|end|>"
        (folder / "chat_template.jinja").write_text("file wins")
        assert load_chat_template(folder).render(CHAT) == "file wins"
        named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
        (folder / "chat_template.jinja").unlink()
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
        assert load_chat_template(folder).render(CHAT) == "yes"

    @pytest.mark.parametrize("config", ["{}", "{", "[]", '{"chat_template": "{% for %}"}', '{"chat_template": [3]}'])
    def test_missing_or_broken_template(self, tmp_path, config):
        (tmp_path / "tokenizer_config.json").write_text(config)
        with pytest.raises(SourceError, match="chat template"):
            load_chat_template(tmp_path)

    @pytest.mark.model
    def test_equals_transformers_on_a_real_template(self, model_path, tokenizer):
        for chat in (CHAT, CHAT[1:], CHAT[:1]):
            assert load_chat_template(model_path).render(chat) == tokenizer.apply_chat_template(chat, tokenize=False)


class TestParquet:
    def test_texts_chats_and_ids(self, make, tmp_path):
        table = pa.table({"text": [f"text {i}" for i in range(200)], "chat": [CHAT] * 200, "ids": [[1, 2]] * 200})
        pq.write_table(table, tmp_path / "a.parquet", row_group_size=70)
        assert read("a.parquet")[0] == [(f"a.parquet:{i + 1}", f"text {i}") for i in range(200)]
        assert read("a.parquet", field="chat")[0][:3] == [
            ("a.parquet:1", "the cat"), ("a.parquet:1", "the mat"), ("a.parquet:2", "the cat"),
        ]  # fmt: skip
        assert read("a.parquet", field="chat.1.content")[0][-1] == ("a.parquet:200", "hi")
        assert read("a.parquet", field="ids")[0][0] == ("a.parquet:1", [1, 2])

    def test_missing_values_and_columns(self, make, tmp_path):
        pq.write_table(pa.table({"text": ["a", None, "c"], "n": [1, 2, 3]}), tmp_path / "a.parquet")
        found, problems = read("a.parquet")
        assert found == [("a.parquet:1", "a"), ("a.parquet:3", "c")]
        assert problems.first[ProblemKind.MISSING_FIELD] == ["a.parquet:2: no value in the field 'text'"]
        assert read("a.parquet", field="body")[1].first[ProblemKind.MISSING_FIELD] == [
            "a.parquet: no column 'body'; there are: text, n"
        ]
        assert counts(read("a.parquet", field="n")[1]) == {"WRONG_VALUE": 3}
        with pytest.raises(SourceError, match=r"^a\.parquet:2: no value"):
            read("a.parquet", strict=True)

    def test_undecodable(self, make, tmp_path):
        column = pa.array([b"fine", b"caf\xe9", b"too"]).view(pa.string())
        pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
        found, problems = read("a.parquet")
        assert [text for _, text in found] == ["fine", "too"]
        assert problems.first[ProblemKind.UNDECODABLE][0].startswith("a.parquet:2: ")

    def test_damaged(self, make, tmp_path):
        pq.write_table(pa.table({"text": ["a" * 999]}), tmp_path / "a.parquet")
        whole = (tmp_path / "a.parquet").read_bytes()
        for content in (b"", b"the cat", whole[:-20]):
            _, problems = read(make("a.parquet", content))
            assert counts(problems) == {"DAMAGED": 1}

    def test_reports_about_the_files_size(self, make, tmp_path):
        pq.write_table(pa.table({"text": ["a"] * 100}), tmp_path / "a.parquet", row_group_size=10)
        seen = []
        reader = Sources(["a.parquet"], SourceOptions(), Problems(), 9, template, seen.append)
        assert len(list(reader)) == 100
        assert 0.9 < sum(seen) / reader.total_bytes() <= 1

    def test_not_from_standard_input(self):
        with pytest.raises(SourceError, match="standard input"):
            read("-", format=Format.PARQUET)


class TestTokenFiles:
    @pytest.mark.parametrize("dtype", ["u1", "<u2", ">u4", "i8", "<i4"])
    def test_every_integer_type(self, make, tmp_path, dtype):
        np.save(tmp_path / "a.npy", np.array([5, 0, 200], dtype))
        assert read("a.npy")[0] == [("a.npy", [5, 0, 200])]

    def test_long_files_come_in_parts(self, make, tmp_path, monkeypatch):
        monkeypatch.setattr(token_files, "PART_TOKENS", 10)
        np.save(tmp_path / "a.npy", np.arange(35))
        assert [tokens for _, tokens in read("a.npy")[0]] == [[*range(a, min(a + 10, 35))] for a in (0, 10, 20, 30)]

    def test_packed_and_empty(self, make, tmp_path):
        np.save(tmp_path / "e.npy", np.empty(0, np.int32))
        np.save(tmp_path / "a.npy", np.arange(3))
        make("a.npy.gz", gzip.compress((tmp_path / "a.npy").read_bytes()))
        assert read("e.npy")[0] == []
        assert read("a.npy.gz")[0] == [("a.npy.gz", [0, 1, 2])]

    def test_a_folder_of_them(self, make, tmp_path):
        (tmp_path / "ids").mkdir()
        for i in range(3):
            np.save(tmp_path / "ids" / f"{i}.npy", np.array([i]))
        assert read("ids")[0] == [(f"ids/{i}.npy", [i]) for i in range(3)]

    @pytest.mark.parametrize(
        ("array", "message"),
        [
            (np.zeros((2, 2), int), "one-dimensional"),
            (np.array(3), "one-dimensional"),
            (np.zeros(3), "float64"),
            (np.array([{}]), "object"),
            (np.array([3, -1]), "token id -1"),
            (np.array([3, 1000]), "token id 1000"),
            (np.array([2**40]), "token id"),
        ],
    )
    def test_unusable(self, make, tmp_path, array, message):
        np.save(tmp_path / "a.npy", array, allow_pickle=True)
        found, problems = read("a.npy")
        assert found == []
        assert message in problems.first[ProblemKind.DAMAGED][0]

    def test_cut_short_anywhere(self, make, tmp_path):
        np.save(tmp_path / "a.npy", np.arange(9))
        whole = (tmp_path / "a.npy").read_bytes()
        for size in range(len(whole)):
            _, problems = read(make("a.npy", whole[:size]))
            assert counts(problems) == {"DAMAGED": 1}


IGNORE_FILES = {
    ".gitignore": "*.log\nbuild/\n/top.txt\n!keep.log\n# comment\n\ndoc/*.txt\n**/gen/x\nlib\\ a\nq[ab].c\n",
    "sub/.gitignore": "!special.log\n*.tmp\nbuild\n",
    "sub/deep/.gitignore": "*\n!.gitignore\n!yes.py\n",
}
TREE = (
    "a.log", "keep.log", "top.txt", "sub/top.txt", "build/x.py", "sub/build/x.py", "other/build", "sub/special.log",
    "sub/a.log", "sub/a.tmp", "a.tmp", "doc/a.txt", "doc/deep/a.txt", "gen/x", "a/b/gen/x/y", "sub/deep/yes.py",
    "a/b/c", "sub/deep/no.py", "sub/deep/er/yes.py", "lib a", "qa.c", "qc.c", "sub/keep.log", "plain.py",
    "sub/other/keep.log",
)  # fmt: skip


class TestFolders:
    def tree(self, make, *names):
        for name in names:
            make(name, f"# {name}")

    def names(self, *paths, **options):
        return [name for name, _ in read(*paths, **options)[0]]

    def test_every_text_file_in_order_and_named_from_the_given_path(self, make, tmp_path):
        self.tree(make, "p/b.py", "p/a/z.py", "p/a/y.txt", "p/.hidden", "p/.git/config", "p/.github/w.yml")
        assert self.names("p") == ["p/.github/w.yml", "p/.hidden", "p/a/y.txt", "p/a/z.py", "p/b.py"]
        assert self.names("p/") == self.names("p")
        assert self.names(str(tmp_path / "p"))[0] == f"{tmp_path}/p/.github/w.yml"
        assert self.names(".")[0] == "./p/.github/w.yml"

    def test_binary_files_and_links_are_left_out(self, make, tmp_path):
        self.tree(make, "p/a.py")
        make("p/a.pyc", b"\x6f\0\0the")
        (tmp_path / "p/link.py").symlink_to("a.py")
        (tmp_path / "p/loop").symlink_to(".")
        os.mkfifo(tmp_path / "p/pipe")
        found, problems = read("p")
        assert [name for name, _ in found] == ["p/a.py"]
        assert counts(problems) == {"BINARY": 1}

    def test_include_and_exclude(self, make):
        self.tree(make, "p/a.py", "p/b.txt", "p/v/c.py", "p/w/d.py")
        assert self.names("p", include=["*.py"]) == ["p/a.py", "p/v/c.py", "p/w/d.py"]
        assert self.names("p", include=["*.py"], exclude=["v/", "a.*"]) == ["p/w/d.py"]
        assert self.names("p", include=["/*.py"]) == ["p/a.py"]

    def test_mixed_kinds(self, make, tmp_path):
        self.tree(make, "p/a.py")
        make("p/b.jsonl", '{"text": "x"}\n')
        np.save(tmp_path / "p/c.npy", np.array([1]))
        assert self.names("p") == ["p/a.py", "p/b.jsonl:1", "p/c.npy"]

    def test_names_that_are_not_utf8(self, make, tmp_path):
        (tmp_path / "p").mkdir()
        with open(os.fsencode(tmp_path) + b"/p/caf\xe9.txt", "w") as file:
            file.write("x")
        with open(os.fsencode(tmp_path) + b"/p/caf\xea.txt", "w") as file:
            file.write("x")
        assert self.names("p") == [r"p/caf\xe9.txt", r"p/caf\xea.txt"]

    def test_unreadable(self, make, tmp_path, monkeypatch):
        self.tree(make, "p/a.py", "p/b.py", "p/sub/c.py")
        real_open, real_scan = open, os.scandir

        def guarded(path, *args, **kwargs):
            if str(path).endswith("a.py"):
                raise PermissionError(13, "Permission denied", str(path))
            return real_open(path, *args, **kwargs)

        def scan(path):
            if str(path).endswith("sub"):
                raise PermissionError(13, "Permission denied", str(path))
            return real_scan(path)

        # As root, file modes keep nobody out.
        monkeypatch.setattr("builtins.open", guarded)
        monkeypatch.setattr(os, "scandir", scan)
        found, problems = read("p")
        assert [name for name, _ in found] == ["p/b.py"]
        assert sorted(problems.first[ProblemKind.UNREADABLE]) == [
            "p/a.py: permission denied", "p/sub: Permission denied",
        ]  # fmt: skip

    @pytest.mark.parametrize("start", [".", "sub", "sub/deep", "a/b"])
    def test_ignores_what_git_ignores(self, make, tmp_path, start):
        git = ["git", "-C", str(tmp_path), "-c", "core.excludesFile="]
        subprocess.run([*git, "init", "-q"], check=True)
        self.tree(make, *TREE)
        for name, content in IGNORE_FILES.items():
            make(name, content)
        listed = subprocess.run(
            [*git, "ls-files", "-z", "--others", "--exclude-standard", "--", start], check=True, capture_output=True
        )
        expected = sorted(name for name in listed.stdout.decode().split("\0") if name)
        assert sorted(os.path.normpath(name) for name in self.names(start)) == expected
        assert 0 < len(expected) < len(TREE) + len(IGNORE_FILES)

    def test_a_bad_line_costs_that_line_and_a_byte_order_mark_nothing(self, make):
        self.tree(make, "p/a.py", "p/b.log", "p/secret.txt")
        make("p/.gitignore", b"\xef\xbb\xbfsecret.txt\n[z-a]*.log\n!\n*.log\n")
        found, problems = read("p", include=["*.py", "*.log", "*.txt"])
        assert [name for name, _ in found] == ["p/a.py"]
        assert counts(problems) == {"BAD_PATTERN": 2}
        with pytest.raises(SourceError, match="--include"):
            read("p", include=["[z-a]"])

    def test_what_a_repositorys_owner_ignores_for_himself(self, make):
        self.tree(make, "p/a.py", "p/private.txt", "p/sub/private.txt")
        make(".git/info/exclude", "private.txt\n")
        make("p/sub/.gitignore", "!private.txt\n")
        assert self.names("p") == ["p/a.py", "p/sub/.gitignore", "p/sub/private.txt"]

    def test_a_gitignore_above_counts_only_within_a_repository(self, make):
        self.tree(make, "p/a.py", "p/b.txt")
        make(".gitignore", "*.txt\n")
        assert self.names("p") == ["p/a.py", "p/b.txt"]
        make(".git/HEAD", "")
        assert self.names("p") == ["p/a.py"]

    def test_a_folder_that_is_ignored_is_read_when_it_is_named(self, make):
        self.tree(make, "p/build/a.py", "p/build/b.txt", "p/c.py")
        make(".git/HEAD", "")
        make("p/.gitignore", "build/\n")
        make("p/build/.gitignore", "*.txt\n")
        assert self.names("p") == ["p/.gitignore", "p/c.py"]
        assert self.names("p/build") == ["p/build/.gitignore", "p/build/a.py"]


class TestOddFiles:
    def test_a_header_without_an_end(self, make):
        good = make("a.txt", "the cat")
        header = b"{'descr': '<i4', 'fortran_order': False, 'shape': (3,".ljust(117) + b"\n"
        broken = make("b.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
        found, problems = read(good, broken)
        assert found == [("a.txt", "the cat")]
        assert counts(problems) == {"DAMAGED": 1}

    def test_a_time_that_python_does_not_know(self, tmp_path):
        import pyarrow
        import pyarrow.parquet

        times = pyarrow.array([2**53, 0], pyarrow.timestamp("ms"))
        pyarrow.parquet.write_table(pyarrow.table({"text": times}), tmp_path / "a.parquet")
        _, problems = read(tmp_path / "a.parquet")
        assert counts(problems)["WRONG_VALUE"] >= 1


class TestPaths:
    def test_nothing_given_or_not_there(self, make):
        with pytest.raises(SourceError, match="no sources"):
            read()
        with pytest.raises(SourceError, match=r"nowhere: no such file"):
            read(make("a.txt", "x"), "nowhere")

    def test_gone_while_reading(self, make, tmp_path):
        problems = Problems()
        reader = iter(Sources([make("a", "x"), make("b", "y"), make("c", "z")], SourceOptions(), problems, 9, template))
        assert next(reader).name == "a"
        (tmp_path / "b").unlink()
        assert [name for name, _ in reader] == ["c"]
        assert counts(problems) == {"UNREADABLE": 1}

    def test_standard_input(self, monkeypatch):
        for form, content, expected in (
            (Format.AUTO, b"the cat", [("stdin", "the cat")]),
            (Format.AUTO, gzip.compress(b"the cat"), [("stdin", "the cat")]),
            (Format.JSONL, b'{"text": "a"}\n{"text": "b"}', [("stdin:1", "a"), ("stdin:2", "b")]),
        ):
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
            assert read("-", format=form)[0] == expected
            assert not sys.stdin.buffer.closed


class TestTokenizer:
    def test_folder_and_file_agree(self, tmp_path):
        folder = make_tokenizer(tmp_path / "t")
        a, b = Tokenizer(folder), Tokenizer(folder / "tokenizer.json")
        assert a.path == b.path
        assert a.name == str(folder)
        texts_ = ["the cat sat", "", "<|user|>the"]
        got = a.encode(texts_)
        assert [row.dtype for row in got] == [np.int32] * 3
        assert [a.decode(row) for row in got] == texts_
        assert len(got[2]) == 2
        assert len(got[1]) == 0
        assert a.vocabulary_size > max(map(max, (got[0], got[2])))

    def test_truncation_and_padding_are_turned_off(self, tmp_path):
        from tokenizers import Tokenizer as Raw

        folder = make_tokenizer(tmp_path / "t")
        raw = Raw.from_file(str(folder / "tokenizer.json"))
        raw.enable_truncation(3)
        raw.enable_padding(length=9)
        raw.save(str(folder / "tokenizer.json"))
        assert [len(row) for row in Tokenizer(folder).encode(["a", "a a a a"])] == [1, 7]

    def test_by_name_from_the_cache(self, tmp_path, monkeypatch):
        import huggingface_hub.constants

        snapshot = tmp_path / "hub/models--someone--model/snapshots/abc"
        make_tokenizer(snapshot)
        refs = tmp_path / "hub/models--someone--model/refs"
        refs.mkdir()
        (refs / "main").write_text("abc")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        found = Tokenizer("someone/model")
        assert found.name == "someone/model"
        assert found.path == snapshot / "tokenizer.json"
        assert found.chat_template().render(CHAT[1:2]) == "<|user|>hi<|end|>"
        with pytest.raises(SourceError, match=r"someone/other.*hf download"):
            Tokenizer("someone/other")
        with pytest.raises(SourceError, match=r"neither a folder nor a file"):
            Tokenizer("no such thing")

    def test_unusable(self, tmp_path):
        with pytest.raises(SourceError, match=r"no tokenizer\.json in this folder"):
            Tokenizer(tmp_path)
        (tmp_path / "tokenizer.json").write_text("{}")
        with pytest.raises(SourceError, match="not a tokenizer"):
            Tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("module", "name", "content"),
    [("zstandard", "a.zst", zstandard.ZstdCompressor().compress(b"x")), ("pyarrow", "a.parquet", b"")],
)
def test_missing_package_names_the_extra(make, monkeypatch, module, name, content):
    for loaded in [m for m in sys.modules if m.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingPackageError, match=rf"{module}.*freedraft\[index\]"):
        read(make(name, content))
