"""Building whole indexes: the same answers however it is done, and the old index whole whatever goes wrong."""

from __future__ import annotations

import errno
import json
import random
import signal

import numpy as np
import pytest
from tiny_tokenizer import WORDS, make_tokenizer
from typer.testing import CliRunner

from freedraft.retrieval.build import builder, executors
from freedraft.retrieval.build.builder import BuildOptions, append_to_index, build_index, tokenizer_of_index
from freedraft.retrieval.build.tokenize import Tokenizer
from freedraft.retrieval.cli import index_app
from freedraft.retrieval.errors import CapacityError, InputError
from freedraft.retrieval.index.errors import LockedError, SourceError, TokenizerMismatchError
from freedraft.retrieval.index.store import MOST_SEGMENTS, CorpusIndex, IndexWriter, compact
from freedraft.retrieval.query import Follower


def lines(seed, count=60):
    source = random.Random(seed)
    return [" ".join(source.choice(WORDS) for _ in range(source.randrange(1, 30))) for _ in range(count)]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def documents_of(folder):
    """All documents of an index, as sorted (name, tokens)."""
    return sorted(
        (name, tokens.tolist()) for segment in CorpusIndex(folder).segments for name, tokens in segment.documents()
    )


def answers(folder, tokenizer, texts):
    """What the index says at each token of some texts."""
    found = []
    for text in texts:
        follower = Follower(CorpusIndex(folder).segments)
        for token in tokenizer.encode([text])[0]:
            follower.advance(np.array([token], np.int32))
            found.append(follower.continuation())
    return found


def files_of(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(make_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "a.jsonl", lines(1))


@pytest.fixture
def small_segments(monkeypatch):
    """Segments of at most 200 tokens, so that a small corpus has several."""
    monkeypatch.setattr(builder, "segment_tokens", lambda *_: 200)


@pytest.fixture(scope="module")
def reference(tokenizer, corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference") / "index"
    build_index(folder, [corpus], tokenizer)
    return folder


class TestBuild:
    def test_every_document_is_there(self, tokenizer, corpus, reference):
        expected = [(f"{corpus}:{i + 1}", tokenizer.encode([text])[0].tolist()) for i, text in enumerate(lines(1))]
        assert documents_of(reference) == sorted(expected)
        index = CorpusIndex(reference)
        index.verify()
        assert index.manifest.tokenizer.vocabulary_size == tokenizer.vocabulary_size
        assert index.manifest.tokenizer.name == tokenizer.name
        assert (index.manifest.min_count, index.manifest.dedup) == (1, False)

    def test_report(self, tokenizer, corpus, tmp_path):
        seen = []
        report = build_index(
            tmp_path / "i", [corpus], tokenizer, report=lambda p: seen.append((p.bytes_read, p.total_bytes, p.tokens))
        )
        assert report.documents == 60
        assert report.tokens == sum(map(len, tokenizer.encode(lines(1))))
        assert (report.segments, report.duplicates) == (1, 0)
        assert seen[-1] == (corpus.stat().st_size, corpus.stat().st_size, report.tokens)
        assert seen == sorted(seen)

    def test_segments_answer_as_one(self, tokenizer, corpus, reference, tmp_path, small_segments):
        report = build_index(tmp_path / "i", [corpus], tokenizer)
        assert report.segments > 5
        assert all(segment.tokens <= 200 for segment in CorpusIndex(tmp_path / "i").segments)
        queries = lines(1)[:5] + lines(2)[:10]
        assert answers(tmp_path / "i", tokenizer, queries) == answers(reference, tokenizer, queries)

    def test_dedup(self, tokenizer, tmp_path, small_segments):
        texts = lines(3, 30)
        source = write_jsonl(tmp_path / "a.jsonl", [*texts, *texts, texts[0] + " the"])
        report = build_index(tmp_path / "i", [source], tokenizer, dedup=True)
        distinct = len(set(texts)) + 1
        assert (report.documents, report.duplicates) == (distinct, 61 - distinct)
        again = append_to_index(tmp_path / "i", [source], str(tokenizer.path))
        assert (again.documents, again.duplicates) == (0, 61)
        assert len(documents_of(tmp_path / "i")) == distinct
        more = write_jsonl(tmp_path / "b.jsonl", [texts[3], "the cat sat on the mat for it"])
        assert append_to_index(tmp_path / "i", [more], str(tokenizer.path)).documents == 1

    def test_dedup_of_what_is_longer_than_a_segment(self, tokenizer, tmp_path, small_segments):
        np.save(tmp_path / "long.npy", np.random.default_rng(0).integers(0, 20, 900))
        assert build_index(tmp_path / "i", [tmp_path / "long.npy"], tokenizer, dedup=True).segments > 3
        again = append_to_index(tmp_path / "i", [tmp_path / "long.npy"], str(tokenizer.path))
        assert again.documents == 0

    def test_a_merge_after_an_append_waits_for_no_other_writer(self, tokenizer, tmp_path, monkeypatch):
        source = write_jsonl(tmp_path / "a.jsonl", ["the cat sat"])
        build_index(tmp_path / "i", [source], tokenizer)
        for _ in range(MOST_SEGMENTS - 1):
            append_to_index(tmp_path / "i", [source])
        others = []

        def compact_while_another_tries(writer, limit):
            with pytest.raises(LockedError):
                IndexWriter(tmp_path / "i").__enter__()
            others.append(compact(writer, limit))

        monkeypatch.setattr(builder, "compact", compact_while_another_tries)
        append_to_index(tmp_path / "i", [source])
        assert len(others) == 1
        assert len(CorpusIndex(tmp_path / "i").segments) < MOST_SEGMENTS

    def test_a_merge_that_fails_leaves_what_was_added(self, tokenizer, tmp_path, monkeypatch):
        def fail(writer, limit):
            writer.new_segment_path().write_bytes(b"half")
            raise OSError(errno.ENOSPC, "no space left")

        one, other = (write_jsonl(tmp_path / f"{i}.jsonl", lines(i, 5)) for i in range(2))
        build_index(tmp_path / "i", [one], tokenizer)
        monkeypatch.setattr(builder, "compact", fail)
        report = append_to_index(tmp_path / "i", [other], tokenizer.path.parent)
        assert report.documents == 5
        assert "no space left" in report.merge_failure
        segments = CorpusIndex(tmp_path / "i").segments
        assert sum(len(segment) for segment in segments) == 10
        assert len(files_of(tmp_path / "i")) == 2 + len(segments)
        said = CliRunner().invoke(index_app, ["append", str(tmp_path / "i"), str(other)])
        assert said.exit_code == 0
        assert "could not be merged: OSError: [Errno 28] no space left" in said.stderr

    def test_min_count_drops_rare_continuations(self, tokenizer, tmp_path):
        source = write_jsonl(tmp_path / "a.jsonl", ["the cat sat"] * 3 + ["the dog sat", "a dog is not"])
        build_index(tmp_path / "all", [source], tokenizer)
        build_index(tmp_path / "common", [source], tokenizer, min_count=2)
        assert CorpusIndex(tmp_path / "common").manifest.min_count == 2
        for folder, expected in (("all", {"cat": 3, "dog": 1}), ("common", {"cat": 3})):
            follower = Follower(CorpusIndex(tmp_path / folder).segments)
            follower.advance(tokenizer.encode(["the "])[0])
            known = follower.continuation()
            assert {tokenizer.decode([token]): times for token, times in known.tokens} == expected
        sizes = [CorpusIndex(tmp_path / f).segments[0].header.nodes for f in ("all", "common")]
        assert sizes[0] > sizes[1]

    def test_token_files_need_no_text(self, tokenizer, tmp_path):
        np.save(tmp_path / "a.npy", np.array([1, 2, 3, 1, 2, 4], np.uint16))
        build_index(tmp_path / "i", [tmp_path / "a.npy"], tokenizer)
        assert documents_of(tmp_path / "i") == [(str(tmp_path / "a.npy"), [1, 2, 3, 1, 2, 4])]

    def test_nothing_to_index(self, tokenizer, tmp_path):
        (tmp_path / "a.txt").write_text("")
        (tmp_path / "b.jsonl").write_text("{\n")
        with pytest.raises(SourceError, match=r"nothing to index; skipped 1 broken JSON line"):
            build_index(tmp_path / "i", [tmp_path / "a.txt", tmp_path / "b.jsonl"], tokenizer)
        with pytest.raises(SourceError, match="no such file"):
            build_index(tmp_path / "i", [tmp_path / "c.txt"], tokenizer)
        assert not (tmp_path / "i").exists() or files_of(tmp_path / "i") in ([], ["lock"])

    def test_an_index_is_replaced_only_when_asked(self, tokenizer, corpus, tmp_path):
        other = write_jsonl(tmp_path / "b.jsonl", ["the dog"])
        build_index(tmp_path / "i", [corpus], tokenizer)
        before = documents_of(tmp_path / "i")
        with pytest.raises(InputError, match="there is an index already"):
            build_index(tmp_path / "i", [other], tokenizer)
        assert documents_of(tmp_path / "i") == before
        build_index(tmp_path / "i", [other], tokenizer, overwrite=True)
        assert [name for name, _ in documents_of(tmp_path / "i")] == [f"{other}:1"]

    def test_a_problem_with_strict_leaves_the_old_index(self, tokenizer, corpus, tmp_path, small_segments):
        build_index(tmp_path / "i", [corpus], tokenizer)
        before, files = documents_of(tmp_path / "i"), files_of(tmp_path / "i")
        bad = tmp_path / "b.jsonl"
        bad.write_text(corpus.read_text() + "{\n")
        strict = BuildOptions(strict=True)
        with pytest.raises(SourceError, match=r"b\.jsonl:61: not valid JSON"):
            build_index(tmp_path / "i", [bad], tokenizer, options=strict, overwrite=True)
        with pytest.raises(SourceError, match=r"b\.jsonl:61: not valid JSON"):
            append_to_index(tmp_path / "i", [bad], options=strict)
        assert documents_of(tmp_path / "i") == before
        assert files_of(tmp_path / "i") == files


class TestAppend:
    def test_adds_and_keeps(self, tokenizer, corpus, reference, tmp_path):
        a = write_jsonl(tmp_path / "a.jsonl", lines(1)[:30])
        b = write_jsonl(tmp_path / "b.jsonl", lines(1)[30:])
        build_index(tmp_path / "i", [a], tokenizer)
        report = append_to_index(tmp_path / "i", [b])
        assert report.documents == 30
        queries = lines(2)[:10]
        assert answers(tmp_path / "i", tokenizer, queries) == answers(reference, tokenizer, queries)
        CorpusIndex(tmp_path / "i").verify()

    def test_many_appends_are_merged(self, tokenizer, tmp_path):
        build_index(tmp_path / "i", [write_jsonl(tmp_path / "a.jsonl", ["the cat"])], tokenizer)
        for i in range(30):
            source = write_jsonl(tmp_path / f"{i}.jsonl", lines(i + 10, 2))
            append_to_index(tmp_path / "i", [source])
        assert len(documents_of(tmp_path / "i")) == 61
        assert len(CorpusIndex(tmp_path / "i").segments) < 20

    def test_another_tokenizer_is_refused_naming_both(self, tokenizer, corpus, tmp_path):
        other = make_tokenizer(tmp_path / "other", ("zebra",))
        build_index(tmp_path / "i", [corpus], tokenizer)
        before = documents_of(tmp_path / "i")
        with pytest.raises(TokenizerMismatchError) as caught:
            append_to_index(tmp_path / "i", [corpus], other)
        assert tokenizer.name in str(caught.value)
        assert str(other) in str(caught.value)
        assert documents_of(tmp_path / "i") == before

    def test_the_same_tokenizer_elsewhere_is_taken(self, tokenizer, tmp_path, corpus):
        moved = make_tokenizer(tmp_path / "here")
        build_index(tmp_path / "i", [corpus], Tokenizer(moved))
        manifest = CorpusIndex(tmp_path / "i").manifest
        moved.rename(tmp_path / "there")
        with pytest.raises(SourceError, match="give --tokenizer"):
            tokenizer_of_index(manifest)
        assert tokenizer_of_index(manifest, tmp_path / "there").path == tmp_path / "there/tokenizer.json"
        assert append_to_index(tmp_path / "i", [corpus], tmp_path / "there").documents == 60


class TestWorkers:
    def test_the_same_segments(self, tokenizer, corpus, tmp_path, small_segments):
        build_index(tmp_path / "one", [corpus], tokenizer)
        build_index(tmp_path / "two", [corpus], tokenizer, options=BuildOptions(workers=2))
        assert documents_of(tmp_path / "two") == documents_of(tmp_path / "one")
        one, two = (CorpusIndex(tmp_path / name).segments for name in ("one", "two"))
        assert [segment.names() for segment in two] == [segment.names() for segment in one]
        assert [segment.path.read_bytes() for segment in two] == [segment.path.read_bytes() for segment in one]

    def test_a_worker_that_dies_ends_the_build_and_leaves_the_old_index(
        self, tokenizer, corpus, tmp_path, small_segments, monkeypatch
    ):
        build_index(tmp_path / "i", [corpus], tokenizer)
        before, files = documents_of(tmp_path / "i"), files_of(tmp_path / "i")
        real = executors.ProcessPoolExecutor.submit

        def kill_itself(pool, function, path, documents, min_count):
            return real(pool, signal.raise_signal, signal.SIGKILL)

        monkeypatch.setattr(executors.ProcessPoolExecutor, "submit", kill_itself)
        with pytest.raises(CapacityError, match="--max-memory"):
            build_index(tmp_path / "i", [corpus], tokenizer, options=BuildOptions(workers=2), overwrite=True)
        assert documents_of(tmp_path / "i") == before
        assert files_of(tmp_path / "i") == files

    def test_an_error_in_a_worker_is_the_builds(self, tokenizer, corpus, tmp_path, monkeypatch):
        monkeypatch.setattr(builder, "segment_tokens", lambda *_: 200)
        real = executors.ProcessPoolExecutor.submit

        def fail(pool, function, path, documents, min_count):
            return real(pool, function, tmp_path / "no" / "where", documents, min_count)

        monkeypatch.setattr(executors.ProcessPoolExecutor, "submit", fail)
        with pytest.raises(OSError, match="where"):
            build_index(tmp_path / "i", [corpus], tokenizer, options=BuildOptions(workers=2))
