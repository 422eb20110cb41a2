"""Capture: what is written, by whom, how much, with what rights, and what happens when it cannot be."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import signal
import stat
import subprocess
import sys
import threading
from itertools import count

import numpy as np
import pytest
from small_index import create
from tiny_tokenizer import make_tokenizer

from freedraft.plugins import capture as capture_module
from freedraft.plugins import captured
from freedraft.plugins.base import Source
from freedraft.plugins.capture import KEPT, Capture
from freedraft.plugins.captured import append, prepare
from freedraft.plugins.registry import make_drafter
from freedraft.retrieval.errors import ConfigError
from freedraft.retrieval.index.documents import Documents
from freedraft.retrieval.index.errors import SourceError, TokenizerMismatchError
from freedraft.retrieval.index.manifest import TokenizerEntry
from freedraft.retrieval.index.store import MOST_SEGMENTS, CorpusIndex, IndexWriter
from freedraft.retrieval.ragged import ragged

ENTRY = TokenizerEntry("ours", "11" * 16, 100_000)
PROMPT = list(range(100, 120))
REPLY = list(range(1000, 1040))
SIZE = 2**20

# Argv: folder, tokenizer, the first token of all replies, how many replies, tokens of a segment, whether it drafts from
# the folder too.
WORKER = """
import sys
import numpy as np
from freedraft.plugins import capture
from freedraft.plugins.registry import make_drafter
from freedraft.retrieval.ragged import ragged

capture.EXIT_SECONDS = 60  # on a busy machine, the disk may take its time
folder, tokenizer, *numbers = sys.argv[1:]
first, replies, tokens, reads = map(int, numbers)
made = make_drafter("fusion", {"memory": "8MiB", "capture": folder, "tokenizer": tokenizer, "capture_tokens": tokens,
                               **({"index": folder} if reads else {})})
print("ready", flush=True)
sys.stdin.readline()
for i in range(replies):
    slots = made.open(*ragged([[1, 2, 3]]))
    made.draft(slots, np.array([4], np.int32))
    made.extend(slots, *ragged([[first + i * 50 + j for j in range(50)]]))
    made.close(slots)
"""

# As vLLM starts its engine: such a child ends without calling what `atexit` has.
PARENT = """
import multiprocessing, sys
from pathlib import Path
import numpy as np
from freedraft.plugins import capture
from freedraft.plugins.capture import Capture
from freedraft.retrieval.index.documents import Documents
from freedraft.retrieval.index.manifest import TokenizerEntry
from freedraft.retrieval.index.segment import segment_bytes

capture.EXIT_SECONDS = 60

def gather():
    made = Capture(Path(sys.argv[1]), TokenizerEntry("ours", "11" * 16, 100), 2**20, 10**6)
    made.add([np.array([5, 6, 7], np.int32)])

# The parent has sorted with several threads, which its child lacks.
segment_bytes(Documents.of([("", np.arange(1000, dtype=np.int32))]))
child = multiprocessing.get_context("fork").Process(target=gather)
child.start()
child.join()
sys.exit(child.exitcode)
"""

COMPILING = 300
"""Seconds that a process may take whose kernels are not in the cache yet."""


def start(*arguments, reads=True):
    command = [sys.executable, "-c", WORKER, *map(str, arguments), str(int(reads))]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def go(process):
    assert process.stdout.readline() == "ready\n"
    process.stdin.write("go\n")
    process.stdin.flush()


def replies_of_worker(first, replies):
    return [[first + i * 50 + j for j in range(50)] for i in range(replies)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """One that has all the tokens of these tests, though no word for most."""
    folder = make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["the last"] = 2**31 - 2
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return str(folder)


@pytest.fixture
def new_capture(tmp_path, monkeypatch):
    """Makes a Capture of a folder in tmp_path; all are closed in the end."""
    made = []
    monkeypatch.setattr(capture_module, "EXIT_SECONDS", 60)

    def make(tokens=10**6, folder="captured", max_size=SIZE):
        made.append(Capture(tmp_path / folder, ENTRY, max_size, tokens))
        return made[-1]

    yield make
    for one in made:
        one.close()


def texts(folder):
    """All documents of a sound index, in its order."""
    index = CorpusIndex(folder)
    index.verify()
    return [tokens.tolist() for segment in index.segments for _, tokens in segment.documents()]


def array(tokens):
    return np.array(tokens, np.int32)


def reply(made, prompt, tokens):
    slots = made.open(*ragged([prompt]))
    made.draft(slots, np.array([8], np.int32))
    made.extend(slots, *ragged([tokens]))
    made.close(slots)


def fusion(**options):
    return make_drafter("fusion", {"memory": "8MiB", "min_probability": 0, "max_tokens": 8, **options})


class TestOfFusion:
    def test_it_is_off_unless_asked_for(self, tmp_path, tokenizer, monkeypatch):
        monkeypatch.chdir(tmp_path)
        before = threading.active_count()
        made = fusion(tokenizer=tokenizer)
        reply(made, PROMPT, REPLY)
        assert made.capture is None
        assert threading.active_count() == before
        assert not list(tmp_path.iterdir())

    def test_a_rehearsal_captures_nothing(self, tmp_path, tokenizer):
        options = {"memory": "8MiB", "capture": str(tmp_path / "c"), "tokenizer": tokenizer}
        assert make_drafter("fusion", options, rehearsing=True).capture is None
        assert not (tmp_path / "c").exists()
        assert make_drafter("fusion", options).capture is not None

    def test_replies_are_written_without_their_prompts(self, tmp_path, tokenizer):
        made = fusion(capture=str(tmp_path / "c"), tokenizer=tokenizer)
        reply(made, PROMPT, REPLY)
        made.close(made.open(*ragged([PROMPT])))
        slots = made.open(*ragged([PROMPT, PROMPT, PROMPT]))
        made.draft(slots, np.zeros(3, np.int32))
        made.extend(slots, *ragged([[7, 8, 9], [], [5]]))
        made.close(slots)
        made.capture.close()
        assert texts(tmp_path / "c") == [REPLY, [7, 8, 9]]
        assert made.capture.written == len(REPLY) + 3

    def test_tokens_that_the_tokenizer_does_not_have_are_not_kept(self, new_capture, tmp_path):
        made = new_capture()
        made.add([array([1, 2, ENTRY.vocabulary_size]), array([]), array([3, 4, ENTRY.vocabulary_size - 1])])
        made.close()
        assert texts(tmp_path / "captured") == [[3, 4, ENTRY.vocabulary_size - 1]]
        assert made.dropped == 3

    def test_the_next_process_drafts_from_them(self, tmp_path, tokenizer):
        folder = str(tmp_path / "c")
        first = start(folder, tokenizer, 1000, 3, 10**6)
        go(first)
        assert first.wait(COMPILING) == 0
        assert texts(folder) == replies_of_worker(1000, 3)
        made = fusion(capture=folder, index=folder, tokenizer=tokenizer)
        slots = made.open(*ragged([[*PROMPT, *range(1060, 1070)]]))
        drafts = made.draft(slots, np.array([8], np.int32))
        assert drafts.tokens.tolist() == list(range(1070, 1078))
        assert set(drafts.source.tolist()) == {Source.CORPUS}
        made.capture.close()

    def test_what_is_refused(self, tmp_path, tokenizer):
        folder = str(tmp_path / "c")
        with pytest.raises(ConfigError, match=r"capture: needs the setting `tokenizer`"):
            fusion(capture=folder)
        with pytest.raises(ConfigError, match=r"capture: .*scope: off"):
            fusion(capture=folder, tokenizer=tokenizer, scope="off")
        with pytest.raises(SourceError, match="nowhere"):
            fusion(capture=folder, tokenizer=str(tmp_path / "nowhere"))
        with pytest.raises(ConfigError, match="capture_tokens"):
            fusion(capture=folder, tokenizer=tokenizer, capture_tokens=0)
        assert not (tmp_path / "c").exists()


class TestManyProcesses:
    def test_two_that_write_at_once_lose_nothing(self, tmp_path, tokenizer):
        folder = tmp_path / "c"
        processes = [start(folder, tokenizer, first, 40, 200) for first in (10_000, 20_000)]
        for process in processes:
            go(process)
        assert [process.wait(COMPILING) for process in processes] == [0, 0]
        assert sorted(texts(folder)) == [*replies_of_worker(10_000, 40), *replies_of_worker(20_000, 40)]
        assert {path.suffix for path in folder.iterdir()} == {".segment", ".json", ""}

    def test_one_that_is_killed_leaves_a_whole_index(self, tmp_path, tokenizer):
        folder = tmp_path / "c"
        for life in range(3):
            # For each number of segments that a drafter reads, kernels are compiled.
            process = start(folder, tokenizer, 1000 * 10**3 * (life + 1), 10**5, 100, reads=False)
            go(process)
            before = len(texts(folder))
            while sum(entry.documents for entry in CorpusIndex(folder).manifest.segments) == before:
                assert process.poll() is None
            process.send_signal(signal.SIGKILL)
            process.wait(60)
            kept = texts(folder)
            assert len(kept) > before
        # The next writer goes on, and removes what was left behind.
        append(folder, CorpusIndex(folder).manifest.tokenizer, Documents.of([("new", array(REPLY))]), SIZE)
        assert texts(folder) == [*kept, REPLY]
        named = {entry.file for entry in CorpusIndex(folder).manifest.segments}
        assert {path.name for path in folder.iterdir()} == {*named, "manifest.json", ".lock"}

    def test_a_fork_does_not_write_what_its_parent_gathered(self, new_capture, tmp_path):
        made = new_capture()
        made.add([array(REPLY)])
        child = os.fork()
        if child == 0:
            try:
                made.add([array([5, 6, 7])])
                made.close()
            finally:
                os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert texts(tmp_path / "captured") == [[5, 6, 7]]
        made.close()
        assert texts(tmp_path / "captured") == [[5, 6, 7], REPLY]

    def test_a_child_of_multiprocessing_writes_at_its_end(self, tmp_path):
        subprocess.run([sys.executable, "-c", PARENT, tmp_path / "c"], check=True, timeout=COMPILING)
        assert texts(tmp_path / "c") == [[5, 6, 7]]

    def test_two_that_start_at_once_make_one_index(self, tmp_path):
        errors = []

        def make():
            try:
                prepare(tmp_path / "c", ENTRY)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=make) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert texts(tmp_path / "c") == []


class TestWhatIsGathered:
    def test_a_segment_is_written_when_there_is_enough(self, new_capture, tmp_path, monkeypatch):
        written = threading.Event()

        def noted(*arguments):
            append(*arguments)
            written.set()

        monkeypatch.setattr(capture_module, "append", noted)
        made = new_capture(tokens=100)
        made.add([array(range(99))])
        assert not written.is_set()
        made.add([array([1, 2])])
        assert written.wait(60)
        assert texts(tmp_path / "captured") == [list(range(99)), [1, 2]]

    def test_a_long_reply_is_cut(self, new_capture, tmp_path):
        made = new_capture(tokens=100)
        made.add([array(range(250))])
        made.close()
        assert texts(tmp_path / "captured") == [list(range(100)), list(range(100, 200)), list(range(200, 250))]

    def test_a_reply_is_kept_once(self, new_capture, tmp_path):
        for _ in range(2):
            made = new_capture()
            made.add([array(REPLY), array([5, 6, 7]), array(REPLY)])
            made.close()
        assert texts(tmp_path / "captured") == [REPLY, [5, 6, 7]]

    def test_names_tell_them_apart(self, new_capture, tmp_path):
        made = new_capture()
        made.add([array([i, 2, 3]) for i in range(9)])
        made.close()
        names = [name for segment in CorpusIndex(tmp_path / "captured").segments for name in segment.names()]
        assert len(set(names)) == 9
        assert all(f"-{os.getpid()}-" in name for name in names)

    def test_after_the_end_nothing_is_taken(self, new_capture, tmp_path):
        made = new_capture()
        made.close()
        made.add([array(REPLY)])
        made.close()
        assert texts(tmp_path / "captured") == []

    def test_only_the_owner_may_read(self, tmp_path, monkeypatch):
        folder = tmp_path / "c"
        for umask in (0o000, 0o022):
            before = os.umask(umask)
            try:
                prepare(folder, ENTRY)
                # Enough for segments to be merged.
                for i in range(12):
                    append(folder, ENTRY, Documents.of([("d", array([umask, i, 1, 2]))]), SIZE)
                modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
            finally:
                os.umask(before)
            assert set(modes.values()) == {0o600}
            assert {"manifest.json", ".lock"} < set(modes)
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700


class TestSize:
    def test_it_holds_and_the_oldest_go(self, tmp_path):
        source = np.random.default_rng(1)
        added = []
        lost = False
        for i in range(80):
            rows = [source.integers(0, 50_000, 200, np.int32) for _ in range(5)]
            added += [row.tolist() for row in rows]
            append(tmp_path / "c", ENTRY, Documents.of((f"{i}", row) for row in rows), SIZE)
            index = CorpusIndex(tmp_path / "c")
            assert sum(path.stat().st_size for path in (tmp_path / "c").glob("*.segment")) <= SIZE
            assert len(index.segments) <= MOST_SEGMENTS
            kept = texts(tmp_path / "c")
            assert kept == added[len(added) - len(kept) :]
            if len(kept) < len(added):
                lost = True
                # No more than a quarter of it goes at once, and there is no less than that of room left over.
                assert sum(entry.size for entry in index.manifest.segments) > SIZE / 2
        assert lost

    def test_capture_keeps_to_it(self, new_capture, tmp_path):
        source = np.random.default_rng(1)
        made = new_capture()
        for _ in range(60):
            made.add([source.integers(0, 50_000, 1000, np.int32)])
        made.close()
        assert made.written + made.dropped == 60_000
        assert texts(tmp_path / "captured")
        assert sum(path.stat().st_size for path in (tmp_path / "captured").glob("*.segment")) <= SIZE

    def test_in_haste_only_the_newest_is_written_anew(self, tmp_path):
        def files():
            return [entry.file for entry in CorpusIndex(tmp_path / "c").manifest.segments]

        def add(i, in_haste):
            append(tmp_path / "c", ENTRY, Documents.of([("d", array([i, 1, 2]))]), SIZE, in_haste)

        for i in range(MOST_SEGMENTS):
            add(i, False)
        before = files()
        assert len(before) == MOST_SEGMENTS
        add(50, True)
        assert files()[:-1] == before[:-1]
        assert len(files()) == MOST_SEGMENTS
        add(51, False)
        assert len(files()) == 1
        assert texts(tmp_path / "c") == [[i, 1, 2] for i in (*range(MOST_SEGMENTS), 50, 51)]

    def test_a_smaller_size_than_before(self, tmp_path):
        source = np.random.default_rng(1)
        for _ in range(6):
            append(tmp_path / "c", ENTRY, Documents.of([("d", source.integers(0, 9, 5000, np.int32))]), 2**30)
        rows = texts(tmp_path / "c")
        append(tmp_path / "c", ENTRY, Documents.of([("d", array(REPLY))]), 600_000)
        kept = texts(tmp_path / "c")
        assert 1 < len(kept) < 7
        assert kept == [*rows, REPLY][-len(kept) :]


class TestOthersIndexes:
    def test_a_built_one_is_left_alone(self, tmp_path, tokenizer):
        folder = create(tmp_path / "built", [[1, 2, 3]])
        before = {path.name: path.read_bytes() for path in (tmp_path / "built").iterdir()}
        with pytest.raises(ConfigError, match=r"built: expected a folder for captured replies alone.*elsewhere"):
            fusion(capture=folder, tokenizer=tokenizer)
        assert {path.name: path.read_bytes() for path in (tmp_path / "built").iterdir()} == before

    def test_so_is_one_that_got_other_documents(self, new_capture, tmp_path):
        made = new_capture()
        with IndexWriter(tmp_path / "captured") as writer:
            manifest = CorpusIndex(tmp_path / "captured").manifest
            writer.commit(captured.replace(manifest, sources=("capture", "/home/me/notes")))
        made.add([array(REPLY)])
        made.close()
        assert made.failures == 1
        assert made.dropped == len(REPLY)
        assert texts(tmp_path / "captured") == []
        with pytest.raises(ConfigError, match="/home/me/notes"):
            new_capture()

    def test_one_of_another_tokenizer(self, new_capture, tmp_path, tokenizer):
        new_capture()
        with pytest.raises(TokenizerMismatchError, match=r"the tokens of ours, while .* another vocabulary"):
            fusion(capture=str(tmp_path / "captured"), tokenizer=tokenizer)


class TestFailure:
    def test_a_folder_that_cannot_be(self, new_capture, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(ConfigError, match=r"file/x: cannot be made"):
            new_capture(folder="file/x")

    def test_it_is_said_once_counted_and_made_good(self, new_capture, tmp_path, monkeypatch, caplog):
        tries = count()
        written = threading.Event()
        write_segment = captured.write_segment

        def write(*arguments):
            if next(tries) < 3:
                raise OSError(errno.ENOSPC, "No space left on device")
            written.set()
            return write_segment(*arguments)

        monkeypatch.setattr(captured, "write_segment", write)
        monkeypatch.setattr(capture_module, "FAILURE_SECONDS", 0.001)
        made = new_capture(tokens=10)
        with caplog.at_level(logging.WARNING, "freedraft"):
            made.add([array(REPLY)])
            assert written.wait(60)
            made.close()
        assert [record.message.count("No space left") for record in caplog.records] == [1]
        assert made.failures == 3
        assert made.written == len(REPLY)
        assert made.dropped == 0
        assert [token for text in texts(tmp_path / "captured") for token in text] == REPLY

    def test_a_text_that_fails_is_not_tried_for_ever(self, new_capture, tmp_path, monkeypatch):
        calls = count()

        def once(*arguments):
            if next(calls) == 0:
                raise ArithmeticError("a text of its own kind")
            return append(*arguments)

        monkeypatch.setattr(capture_module, "append", once)
        made = new_capture(tokens=10)
        made.add([array(range(10)), array(range(20, 30))])
        made.close()
        assert (made.failures, made.dropped, made.written) == (1, 10, 10)
        assert texts(tmp_path / "captured") == [list(range(20, 30))]

    def test_while_another_writes_the_text_is_kept(self, new_capture, tmp_path, monkeypatch):
        met = threading.Event()
        real = capture_module.is_busy
        monkeypatch.setattr(capture_module, "is_busy", lambda error: met.set() or real(error))
        made = new_capture(tokens=10)
        with IndexWriter(tmp_path / "captured"):
            made.add([array(REPLY)])
            assert met.wait(60)
        made.close()
        assert (made.failures, made.dropped, made.written) == (0, 0, len(REPLY))

    def test_no_more_than_a_bound(self, new_capture, tmp_path, monkeypatch):
        met = threading.Event()
        real = capture_module.is_busy
        monkeypatch.setattr(capture_module, "is_busy", lambda error: met.set() or real(error))
        made = new_capture(tokens=10)
        with IndexWriter(tmp_path / "captured"):
            made.add([array([0, *range(9)])])
            assert met.wait(60)
            for i in range(1, 3 * KEPT):
                made.add([array([i, *range(9)])])
        made.close()
        kept = [text[0] for text in texts(tmp_path / "captured")]
        assert kept == list(range(2 * KEPT, 3 * KEPT))
        assert made.dropped == 2 * KEPT * 10

    def test_the_end_of_the_process_is_not_held_up(self, new_capture, tmp_path, monkeypatch, caplog):
        monkeypatch.setattr(capture_module, "EXIT_SECONDS", 0.1)
        made = new_capture()
        made.add([array(REPLY)])
        with IndexWriter(tmp_path / "captured"), caplog.at_level(logging.WARNING, "freedraft"):
            made.close()
        assert made.dropped == len(REPLY)
        assert "40 tokens could not be written" in caplog.text

    def test_no_thread_to_be_had(self, new_capture, monkeypatch, caplog):
        made = new_capture()

        def refuse(thread):
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(threading.Thread, "start", refuse)
        made.add([array(REPLY)])
        made.add([array(REPLY)])
        made.close()
        assert made.failures == 2
        assert made.dropped == 2 * len(REPLY)


def test_a_run_of_random_replies(new_capture, tmp_path):
    source = random.Random(3)
    rows = [[source.randrange(50) for _ in range(source.randrange(0, 60))] for _ in range(300)]
    made = new_capture(tokens=1000)
    for at in range(0, 300, 7):
        made.add([array(row) for row in rows[at : at + 7]])
    made.close()
    assert made.dropped == 0
    assert texts(tmp_path / "captured") == list(map(list, dict.fromkeys(tuple(row) for row in rows if len(row) > 1)))
