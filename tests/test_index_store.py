"""An index as a folder: whole at every moment, one writer at a time, and nothing believed that a manifest says."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from dataclasses import replace

import naive
import numpy as np
import pytest

from freedraft.retrieval.index import store
from freedraft.retrieval.index.documents import Documents
from freedraft.retrieval.index.errors import (
    ChecksumError,
    CorpusIndexError,
    LockedError,
    ManifestError,
    NotAFileError,
    NotFoundError,
    SourceError,
    VersionError,
)
from freedraft.retrieval.index.fingerprint import tokenizer_fingerprint
from freedraft.retrieval.index.manifest import MANIFEST, Manifest, Reading, TokenizerEntry, read_manifest
from freedraft.retrieval.index.store import (
    MERGED_AT_ONCE,
    MOST_SEGMENTS,
    CorpusIndex,
    IndexWriter,
    compact,
    delete_documents,
    merge_segments,
    write_segment,
)
from freedraft.retrieval.query import Follower

TOKENIZER = TokenizerEntry("letters", "00" * 16, 100)
READING = {"format": "auto", "field": "text", "chat": "replies", "include": [], "exclude": []}


def documents_of(rows, first=0):
    return Documents.of((f"document {first + i}", np.array(row, np.int32)) for i, row in enumerate(rows))


def create(folder, rows, min_count=1):
    with IndexWriter(folder, create=True) as writer:
        entry = write_segment(writer.new_segment_path(), documents_of(rows), min_count)
        writer.commit(Manifest(TOKENIZER, min_count, segments=(entry,)))


def append(folder, rows, first):
    with IndexWriter(folder) as writer:
        manifest = read_manifest(folder)
        entry = write_segment(writer.new_segment_path(), documents_of(rows, first), manifest.min_count)
        writer.commit(replace(manifest, segments=(*manifest.segments, entry)))


def files_in(folder):
    return {path.name for path in folder.iterdir() if path.name != ".lock"}


def named_in(folder):
    return {MANIFEST, *(entry.file for entry in read_manifest(folder).segments)}


def assert_answers(folder, rows):
    """The index knows exactly `rows`: for every suffix of some texts, what follows and how often."""
    index = CorpusIndex(folder)
    index.verify()
    source = random.Random(1)
    for _ in range(30):
        text = [source.randrange(5) for _ in range(source.randrange(8))]
        follower = Follower(index.segments)
        follower.advance(np.array(text, np.int32))
        known = follower.continuation()
        length = naive.index_match(rows, text)
        assert known.length == length
        if length:
            context = text[len(text) - length :]
            assert dict(known.tokens) == naive.index_continuations(rows, context)
            assert known.count == naive.index_count(rows, context)


def some_rows(seed, number=6):
    source = random.Random(seed)
    return [[source.randrange(5) for _ in range(source.randrange(30))] for _ in range(number)]


def test_equals_naive_through_append_delete_and_merge(tmp_path):
    folder = tmp_path / "index"
    rows = dict(enumerate(some_rows(0)))
    create(folder, list(rows.values()))
    for step in range(1, 4):
        added = some_rows(step, 3)
        append(folder, added, len(rows))
        rows.update(enumerate(added, len(rows)))
        assert_answers(folder, list(rows.values()))
    gone = [1, 7, 8]
    assert delete_documents(folder, [f"document {i}" for i in gone] + ["no such"]) == 3
    for i in gone:
        del rows[i]
    assert_answers(folder, list(rows.values()))
    assert len(read_manifest(folder).segments) == 4
    merge_segments(folder)
    assert len(read_manifest(folder).segments) == 1
    assert_answers(folder, list(rows.values()))
    assert files_in(folder) == named_in(folder)
    assert delete_documents(folder, [f"document {i}" for i in rows]) == len(rows)
    assert_answers(folder, [])
    assert files_in(folder) == {MANIFEST}


def told(work):
    """What `work` reports, in order: it never falls, and ends with all of it done."""
    reports = []
    work(lambda done, total: reports.append((done, total)))
    done = [one for one, _ in reports]
    assert done == sorted(done)
    assert len({total for _, total in reports}) == 1
    assert reports[-1][0] == reports[-1][1]
    return reports


def test_work_says_how_far_it_is(tmp_path):
    folder = tmp_path / "index"
    create(folder, [[1, 2, 3], [4, 5]])
    for i in range(3):
        append(folder, [[7] * (100 * i + 10)], 2 + i)
    checked = told(CorpusIndex(folder).verify)
    assert checked[-1] == (335, 335)
    assert {5, 15, 125} <= {done for done, _ in checked}
    # Of the first segment one document is written anew, with its border; the others are left alone.
    assert told(lambda report: delete_documents(folder, ["document 0"], report=report))[-1] == (3, 3)
    merged = told(lambda report: merge_segments(folder, report=report))
    assert merged[-1] == (332, 332)
    assert len({done for done, _ in merged}) > 5


def test_what_delete_writes_anew_is_no_larger_than_asked(tmp_path):
    folder = tmp_path / "index"
    rows = [[1, 2, 3], [9] * 20, [4, 1, 2], [1, 2, 5, 6], [7], [8, 1, 2]]
    create(folder, rows)
    assert delete_documents(folder, ["document 4"], max_tokens=9) == 1
    entries = read_manifest(folder).segments
    # A document that is larger by itself is kept whole; 4 + 5 tokens with their borders just fit.
    assert [(entry.documents, entry.tokens) for entry in entries] == [(1, 3), (1, 20), (2, 7), (1, 3)]
    assert_answers(folder, [row for row in rows if row != [7]])
    assert [name for segment in CorpusIndex(folder).segments for name in segment.names()] == [
        f"document {i}" for i in (0, 1, 2, 3, 5)
    ]


def test_a_segment_that_fits_is_written_anew_as_one_of_the_same_bytes(tmp_path):
    rows = some_rows(3, 5)
    create(tmp_path / "all", [*rows, [77, 78]])
    create(tmp_path / "some", rows)
    delete_documents(tmp_path / "all", ["document 5"])
    digests = [[entry.digest for entry in read_manifest(tmp_path / name).segments] for name in ("all", "some")]
    assert digests[0] == digests[1]


def test_a_deleted_document_is_gone_from_disk_at_once(tmp_path):
    folder = tmp_path / "index"
    create(folder, [[1, 2, 3], [77777777, 88888888, 77777777], [1, 2, 4]])
    secret = np.array([77777777, 88888888], "<i4").tobytes()
    assert any(secret in path.read_bytes() for path in folder.iterdir())
    delete_documents(folder, ["document 1"])
    assert not any(secret in path.read_bytes() for path in folder.iterdir())


def test_an_open_index_goes_on_answering_as_it_was(tmp_path):
    folder = tmp_path / "index"
    create(folder, [[1, 2, 3]])
    opened = CorpusIndex(folder)
    delete_documents(folder, ["document 0"])
    opened.verify()
    follower = Follower(opened.segments)
    follower.advance(np.array([1, 2], np.int32))
    assert follower.continuation().tokens == [(3, 1)]


def test_small_segments_are_compacted_and_large_ones_left(tmp_path):
    folder = tmp_path / "index"
    large = [[7] * 500]
    create(folder, large)
    for i in range(MOST_SEGMENTS):
        append(folder, [[1, 2, i]], 1 + i)
    before = read_manifest(folder).segments[0]
    with IndexWriter(folder) as writer:
        compact(writer)
    after = read_manifest(folder)
    assert before in after.segments
    assert len(after.segments) == 1 + MOST_SEGMENTS - MERGED_AT_ONCE + 1
    assert_answers(folder, large + [[1, 2, i] for i in range(MOST_SEGMENTS)])
    merge_segments(folder, max_tokens=100)
    assert before in read_manifest(folder).segments
    assert len(read_manifest(folder).segments) == 2


class TestOneWriter:
    def test_the_second_is_told_who_the_first_is(self, tmp_path):
        create(tmp_path / "index", [[1]])
        holder = rf"process {os.getpid()} on {socket.gethostname()} since 20"
        with IndexWriter(tmp_path / "index"), pytest.raises(LockedError, match=holder):
            IndexWriter(tmp_path / "index").__enter__()
        with IndexWriter(tmp_path / "index"):
            pass

    def test_reading_needs_no_lock(self, tmp_path):
        create(tmp_path / "index", [[1, 2]])
        with IndexWriter(tmp_path / "index"):
            CorpusIndex(tmp_path / "index").verify()

    def test_what_is_not_committed_was_never_there(self, tmp_path):
        folder = tmp_path / "index"
        create(folder, [[1, 2]])
        before = files_in(folder)
        for where, create_it in ((folder, False), (tmp_path / "new", True)):
            with suppress(KeyError), IndexWriter(where, create=create_it) as writer:
                write_segment(writer.new_segment_path(), documents_of([[3]]))
                raise KeyError
        assert files_in(folder) == before
        assert not (tmp_path / "new").exists()

    def test_others_files_are_left_alone(self, tmp_path):
        folder = tmp_path / "index"
        create(folder, [[1, 2]])
        (folder / "notes.txt").write_text("mine")
        (folder / "mine.segment").write_text("mine")
        append(folder, [[1]], 1)
        assert {"notes.txt", "mine.segment"} <= files_in(folder)

    def test_there_must_be_an_index(self, tmp_path):
        for call in (IndexWriter(tmp_path).__enter__, lambda: CorpusIndex(tmp_path), lambda: merge_segments(tmp_path)):
            with pytest.raises(NotFoundError, match="no index there"):
                call()

    def test_a_lock_file_removed_meanwhile_locks_nothing(self, tmp_path, monkeypatch):
        """The second opens the lock file just before the first, which made the folder for nothing, removes it."""
        folder = tmp_path / "index"
        first, second = IndexWriter(folder, create=True), IndexWriter(folder, create=True)
        first.__enter__()
        (folder / "notes.txt").write_text("keeps the folder there")
        flock = fcntl.flock

        def first_ends_before(*arguments):
            monkeypatch.setattr(fcntl, "flock", flock)
            first.__exit__(None, None, None)
            flock(*arguments)

        monkeypatch.setattr(fcntl, "flock", first_ends_before)
        with second:
            with pytest.raises(LockedError):
                IndexWriter(folder, create=True).__enter__()
            entry = write_segment(second.new_segment_path(), documents_of([[1, 2]]))
            second.commit(Manifest(TOKENIZER, segments=(entry,)))
        assert_answers(folder, [[1, 2]])

    def test_the_lock_is_held_until_its_file_is_gone(self, tmp_path, monkeypatch):
        folder = tmp_path / "index"
        first = IndexWriter(folder, create=True)
        first.__enter__()
        close, found = os.close, []

        def look_before(number):
            found.append((folder / ".lock").exists())
            close(number)

        monkeypatch.setattr(os, "close", look_before)
        first.__exit__(None, None, None)
        assert found == [False]

    def test_a_newer_index_is_refused_and_not_left_locked(self, tmp_path):
        folder = tmp_path / "index"
        create(folder, [[1, 2]])
        damaged(folder, lambda m: m.update(version=2))
        before = files_in(folder)
        for _ in range(2):
            with pytest.raises(VersionError, match="update"):
                IndexWriter(folder).__enter__()
        assert files_in(folder) == before

    def test_no_locks_is_not_another_writer(self, tmp_path, monkeypatch):
        create(tmp_path / "index", [[1]])

        def flock(*_):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", flock)
        with pytest.raises(LockedError, match=r"cannot be locked: .*No locks available"):
            IndexWriter(tmp_path / "index").__enter__()


def test_opening_while_a_writer_removes_what_was_just_opened(tmp_path, monkeypatch):
    folder = tmp_path / "index"
    create(folder, [[1, 2, 3]])
    segment, opened = store.Segment, []

    def merged_after(path):
        result = segment(path)
        opened.append(path)
        if len(opened) == 1:
            append(folder, [[9]], 1)
            merge_segments(folder)
        return result

    monkeypatch.setattr(store, "Segment", merged_after)
    index = CorpusIndex(folder)
    assert not opened[0].exists()
    assert [name for part in index.segments for name in part.names()] == ["document 0"]
    index.verify()


VICTIM = textwrap.dedent(
    """
    import json
    import os
    import sys
    import numpy as np
    from dataclasses import replace
    from freedraft.retrieval.index.documents import Documents
    from freedraft.retrieval.index.manifest import read_manifest
    from freedraft.retrieval.index.segment import segment_bytes
    from freedraft.retrieval.index.store import CorpusIndex, IndexWriter, write_segment
    from freedraft.retrieval.index.store import delete_documents, merge_segments

    folder, journal = sys.argv[1], os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    names = [name for segment in CorpusIndex(folder).segments for name in segment.names()]

    def change_to(after, operation):
        # One write is one line, or none: a kill does not tear it.
        global names
        os.write(journal, (json.dumps([names, after]) + "\\n").encode())
        operation()
        names = after
        os.write(journal, (json.dumps([names, names]) + "\\n").encode())

    def append(name):
        with IndexWriter(folder) as writer:
            manifest = read_manifest(folder)
            documents = Documents(np.arange(3000, dtype=np.int32) % 7, np.array([0, 3000]), [name])
            entry = write_segment(writer.new_segment_path(), documents)
            writer.commit(replace(manifest, segments=(*manifest.segments, entry)))

    # Load the kernels first.
    segment_bytes(Documents(np.arange(9, dtype=np.int32), np.array([0, 9]), ["x"]))
    change_to(names, lambda: None)
    print("ready", flush=True)
    number = 0
    while True:
        number += 1
        name = f"added {number}"
        change_to([*names, name], lambda: append(name))
        if number % 3 == 0:
            change_to(names, lambda: merge_segments(folder))
        if number % 4 == 0:
            change_to([other for other in names if other != name], lambda: delete_documents(folder, [name]))
    """
)


def test_a_kill_at_any_moment_leaves_the_old_index_or_the_new_one(tmp_path):
    """Append, merge and delete in a loop, killed again and again; the next writer leaves nothing lying about."""
    folder, journal = tmp_path / "index", tmp_path / "journal"
    first = [1, 2, 3, 1, 2, 4]
    create(folder, [first])
    added = [i % 7 for i in range(3000)]
    source = random.Random(4)
    changed = set()
    for _ in range(12):
        victim = subprocess.Popen([sys.executable, "-c", VICTIM, str(folder), str(journal)], stdout=subprocess.PIPE)
        assert victim.stdout is not None
        assert victim.stdout.readline() == b"ready\n"
        # Not a wait for anything: the moment is what varies.
        time.sleep(source.uniform(0.0, 0.4))
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        victim.stdout.close()
        old, new = json.loads(journal.read_text().splitlines()[-1])
        index = CorpusIndex(folder)
        index.verify()
        documents = [pair for segment in index.segments for pair in segment.documents()]
        names = [name for name, _ in documents]
        assert names in (old, new)
        assert all(tokens.tolist() == (first if name == "document 0" else added) for name, tokens in documents)
        changed.add(len(names))
        with IndexWriter(folder):
            assert files_in(folder) == named_in(folder)
    assert len(changed) > 1


EVERY_STEP = textwrap.dedent(
    """
    import os
    import shutil
    import signal
    import sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[2])
    from test_index_store import CorpusIndex, IndexWriter, append, create, delete_documents, files_in, merge_segments
    from test_index_store import named_in

    STEPS = {"open", "os.rename", "os.remove", "os.truncate"}

    def in_child(function, *arguments):
        # This process itself runs no kernel: a fork with kernels' threads about would hang.
        child = os.fork()
        if not child:
            try:
                function(*arguments)
                os._exit(0)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                sys.stderr.flush()
                os._exit(1)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def names_of(folder):
        return [name for segment in CorpusIndex(folder).segments for name in segment.names()]

    def killed_at(step, folder, operation):
        left = step

        def hook(event, arguments):
            nonlocal left
            if event in STEPS and str(folder) in str(arguments[0]):
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1

        sys.addaudithook(hook)
        operation(folder)

    def start(folder):
        create(folder, [[1, 2, 3], [1, 2, 4]])
        append(folder, [[5, 6]], 2)

    def check(folder, allowed):
        CorpusIndex(folder).verify()
        assert names_of(folder) in allowed, folder
        with IndexWriter(folder):
            assert files_in(folder) == named_in(folder), folder

    top = Path(sys.argv[1])
    assert in_child(start, top / "start") == 0
    operations = {
        "append": lambda folder: append(folder, [[7, 8]], 3),
        "merge": merge_segments,
        "delete": lambda folder: delete_documents(folder, ["document 1"]),
    }
    for what, operation in operations.items():
        shutil.copytree(top / "start", top / what)
        old = names_of(top / what)
        assert in_child(operation, top / what) == 0
        new = names_of(top / what)
        step, ended = 0, -signal.SIGKILL
        while ended == -signal.SIGKILL:
            folder = top / f"{what} {step}"
            shutil.copytree(top / "start", folder)
            ended = in_child(killed_at, step, folder, operation)
            assert in_child(check, folder, (old, new)) == 0
            step += 1
        assert ended == 0
        assert names_of(folder) == new
        # At least the lock, a segment, the manifest, and its renaming.
        assert step > 4
    """
)


@pytest.mark.slow
def test_a_kill_before_every_single_file_operation(tmp_path):
    """What random moments seldom meet: each opening, renaming and removal, in turn, is the one not done any more."""
    done = subprocess.run(
        [sys.executable, "-c", EVERY_STEP, str(tmp_path), os.path.dirname(__file__)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def damaged(folder, change):
    values = json.loads((folder / MANIFEST).read_text())
    change(values)
    (folder / MANIFEST).write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda m: m.update(format="x"), ManifestError, "not the manifest"),
        (lambda m: m.update(version=2), VersionError, "update"),
        (lambda m: m.update(version="1"), ManifestError, "version"),
        (lambda m: m.update(version=True), ManifestError, "version: expected 1, got True"),
        (lambda m: m.update(version=1.0), ManifestError, r"version: expected 1, got 1\.0"),
        (lambda m: m.pop("tokenizer"), ManifestError, "tokenizer is missing"),
        (lambda m: m["tokenizer"].update(fingerprint=3), ManifestError, "fingerprint: expected str"),
        (lambda m: m.update(segments={}), ManifestError, "segments: expected list"),
        (lambda m: m.update(segments=[1]), ManifestError, "expected a list of objects"),
        (lambda m: m.update(sources=[1]), ManifestError, "list of strings"),
        (lambda m: m.update(min_count=0), ManifestError, "min_count: expected 1 to 4294967295, got 0"),
        (lambda m: m.update(min_count=True), ManifestError, "expected int"),
        (lambda m: m.update(dedup="no"), ManifestError, "expected bool"),
        (lambda m: m.update(reading=None), ManifestError, "reading: expected dict"),
        (lambda m: m.update(reading={}), ManifestError, "reading: format is missing"),
        (lambda m: m.update(reading={**READING, "chat": 1}), ManifestError, "reading: chat: expected str"),
        (lambda m: m.update(reading={**READING, "include": "*"}), ManifestError, "reading: include: expected list"),
        (lambda m: m.update(reading={**READING, "exclude": [1]}), ManifestError, "exclude: expected a list of strings"),
        (lambda m: m["segments"].append(m["segments"][0]), ManifestError, "named twice"),
        (lambda m: m["segments"][0].update(file="../x.segment"), ManifestError, "hexadecimal"),
        (lambda m: m["segments"][0].update(file="/etc/passwd"), ManifestError, "hexadecimal"),
        (lambda m: m["segments"][0].update(file="0" * 16 + ".segment\n"), ManifestError, "hexadecimal"),
        (lambda m: m["segments"][0].update(file="0" * 16 + ".segment"), ManifestError, "not there"),
        (lambda m: m["segments"][0].update(tokens=-1), ManifestError, "0 or more"),
        (lambda m: m["segments"][0].update(tokens=99), ManifestError, "the file is"),
        (lambda m: m["segments"][0].update(digest="00"), ManifestError, "the file is"),
    ],
)
def test_malformed_manifests(tmp_path, change, error, words):
    folder = tmp_path / "index"
    create(folder, [[1, 2, 3]])
    damaged(folder, change)
    with pytest.raises(error, match=words):
        CorpusIndex(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b"null"])
def test_manifests_that_are_none(tmp_path, content):
    folder = tmp_path / "index"
    create(folder, [[1, 2, 3]])
    (folder / MANIFEST).write_bytes(content)
    with pytest.raises(ManifestError):
        CorpusIndex(folder)
    # What may be lost is left where it is.
    with IndexWriter(folder):
        assert len(files_in(folder)) == 2


def test_keys_that_may_be_missing_or_are_not_known(tmp_path):
    folder = tmp_path / "index"
    create(folder, [[1, 2, 3]])
    values = json.loads((folder / MANIFEST).read_text())
    assert "reading" not in values
    assert read_manifest(folder).reading is None
    values |= {"reading": {**READING, "include": ["*.py"], "later": 1}, "of a later version": [1]}
    (folder / MANIFEST).write_text(json.dumps(values))
    assert read_manifest(folder).reading == Reading("auto", "text", "replies", ("*.py",), ())
    append(folder, [[4, 5]], 1)
    merge_segments(folder)
    delete_documents(folder, ["document 0"])
    assert read_manifest(folder).reading == Reading("auto", "text", "replies", ("*.py",), ())


def replace_by_link(path):
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def replace_by_pipe(path):
    path.unlink()
    os.mkfifo(path)


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


def replace_by_socket(path):
    path.unlink()
    os.mknod(path, stat.S_IFSOCK | 0o600)  # not bind(): that takes at most 107 characters of path


@pytest.mark.parametrize("change", [replace_by_link, replace_by_pipe, replace_by_folder, replace_by_socket])
@pytest.mark.parametrize("what", ["manifest", "segment"])
def test_only_plain_files_are_opened(tmp_path, change, what):
    folder = tmp_path / "index"
    create(folder, [[1, 2, 3]])
    change(folder / (MANIFEST if what == "manifest" else read_manifest(folder).segments[0].file))
    with pytest.raises(NotAFileError, match="not a plain file"):
        CorpusIndex(folder)


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path):
    folder = tmp_path / "index"
    create(folder, [[1, 2, 3]])
    (tmp_path / "precious").write_text("precious")
    (folder / ".lock").unlink()
    (folder / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(NotAFileError, match="a link"):
        IndexWriter(folder).__enter__()
    assert (tmp_path / "precious").read_text() == "precious"


def mutated(value, source):
    """The value with one place in it changed, whatever it is made of."""
    if isinstance(value, dict) and value and source.random() < 0.9:
        key = source.choice(sorted(value))
        if source.random() < 0.1:
            return {name: other for name, other in value.items() if name != key}
        return {**value, key: mutated(value[key], source)}
    if isinstance(value, list) and value and source.random() < 0.9:
        i = source.randrange(len(value))
        return source.choice([value[:i], [*value, value[i]], [*value[:i], mutated(value[i], source), *value[i + 1 :]]])
    return source.choice(
        [None, True, 0, 1, -1, 2**31, 2**63, 2**80, 1.5, "", "x", "../../etc/passwd", "\ud800", [], {}, [[]], value]
    )


def test_fuzz_manifests(tmp_path):
    folder = tmp_path / "index"
    create(folder, [[1, 2, 3], [2, 3]])
    append(folder, [[4, 5, 6]], 2)
    sound = json.loads((folder / MANIFEST).read_text())
    source = random.Random(0)
    seen = set()
    for _ in range(1500):
        values = sound
        for _ in range(source.choice([1, 1, 1, 3])):
            values = mutated(values, source)
        content = json.dumps(values).encode()
        if source.random() < 0.2:
            place = source.randrange(len(content))
            content = content[:place] + bytes([source.randrange(256)]) + content[place + 1 :]
        (folder / MANIFEST).write_bytes(content)
        try:
            CorpusIndex(folder).verify()
            seen.add("sound")
        except CorpusIndexError as error:
            seen.add(type(error).__name__)
    assert seen >= {"sound", "ManifestError", "VersionError", "DamagedError"}


def test_a_changed_segment_is_found(tmp_path):
    folder = tmp_path / "index"
    create(folder, [[1, 2, 3]])
    path = folder / read_manifest(folder).segments[0].file
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ChecksumError):
        CorpusIndex(folder).verify()


CONTENT = {
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
    "added_tokens": [{"id": 3, "content": "<end>"}],
}


class TestFingerprint:
    def of(self, tmp_path, content):
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps(content))
        return tokenizer_fingerprint(path)

    def test_what_does_not_matter(self, tmp_path):
        first = self.of(tmp_path, CONTENT)
        model = {"merges": [["a", "b"]], "vocab": {"ab": 2, "b": 1, "a": 0}, "type": "BPE", "dropout": None}
        assert self.of(tmp_path, {"added_tokens": CONTENT["added_tokens"], "model": model, "version": "1"}) == first
        assert len(first) == 32

    def test_what_matters(self, tmp_path):
        model = CONTENT["model"]
        others = [
            {**CONTENT, "model": {**model, "vocab": {"a": 1, "b": 0, "ab": 2}}},
            {**CONTENT, "model": {**model, "merges": []}},
            {**CONTENT, "added_tokens": []},
            {**CONTENT, "model": {"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.0]]}},
        ]
        assert len({self.of(tmp_path, content) for content in [CONTENT, *others]}) == 5

    @pytest.mark.parametrize("content", [3, [], {}, {"model": 3}, {"model": {"vocab": 3}}])
    def test_what_is_no_tokenizer(self, tmp_path, content):
        with pytest.raises(SourceError, match=r"expected a tokenizer\.json"):
            self.of(tmp_path, content)
