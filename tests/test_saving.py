"""Saving what fusion has learnt: when the file is written, by whom, and what happens when it cannot be."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from vllm_stand_in import OUTSIDE, Batch, vllm_config

from freedraft.integrations.vllm import Proposer
from freedraft.plugins import mixing, saving
from freedraft.plugins.mixing_file import read_mixer, write_mixer
from freedraft.plugins.registry import make_drafter
from freedraft.retrieval.errors import ConfigError
from freedraft.retrieval.ragged import ragged

PROMPT = [1, 2, 3, 4] * 5
REPLY = [4, 5, 6, 7] * 10

# Argv: the file, how to end. As vLLM starts its engine: a child of multiprocessing does not call what `atexit` has.
PROCESS = """
import multiprocessing, sys
import numpy as np
from freedraft.plugins.registry import make_drafter
from freedraft.retrieval.ragged import ragged

def learn():
    global made
    made = make_drafter("fusion", {"memory": "8MiB", "save_learnt": sys.argv[1]})
    slots = made.open(*ragged([[1, 2, 3, 4] * 5]))
    made.draft(slots, np.array([4], np.int32))
    made.extend(slots, *ragged([[4, 5, 6, 7] * 10]))

if sys.argv[2] == "child":
    child = multiprocessing.get_context("fork").Process(target=learn)
    child.start()
    child.join()
    sys.exit(child.exitcode)
learn()
"""

COMPILING = 300
"""Seconds that a process may take whose kernels are not in the cache yet."""


def fusion(**options):
    return make_drafter("fusion", {"memory": "8MiB", "min_probability": 0, "max_tokens": 8, **options})


def reply(made, tokens=REPLY):
    slots = made.open(*ragged([PROMPT]))
    made.draft(slots, np.array([8], np.int32))
    made.extend(slots, *ragged([tokens]))
    made.close(slots)


def assert_equal(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert np.array_equal(one, other)


def is_as_shipped(mixer):
    return all(np.array_equal(one, other) for one, other in zip(mixer, mixing.start(), strict=True))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "learnt.npz"


class TestWhen:
    def test_when_the_drafter_is_gone(self, path):
        made = fusion(save_learnt=str(path))
        reply(made)
        mixer = made.mixer
        assert not path.exists()
        del made
        gc.collect()
        assert_equal(read_mixer(path), mixer)
        assert not is_as_shipped(mixer)

    @pytest.mark.parametrize("ending", ["main", "child"])
    def test_at_the_end_of_a_process(self, path, ending):
        subprocess.run([sys.executable, "-c", PROCESS, path, ending], check=True, timeout=COMPILING)
        expected = make_drafter("fusion", {"memory": "8MiB"})
        slots = expected.open(*ragged([PROMPT]))
        expected.draft(slots, np.array([4], np.int32))
        expected.extend(slots, *ragged([REPLY]))
        assert_equal(read_mixer(path), expected.mixer)
        assert list(path.parent.iterdir()) == [path]

    def test_now_and_then(self, path, monkeypatch):
        monkeypatch.setattr(saving, "TOKENS", 100)
        monkeypatch.setattr(saving, "SECONDS", 0)
        writers = written_by(monkeypatch)
        made = fusion(save_learnt=str(path))
        reply(made, REPLY[:40])
        reply(made, REPLY[:40])
        assert not path.exists()
        reply(made, REPLY[:40])
        made.saving._thread.join(COMPILING)
        assert_equal(read_mixer(path), made.mixer)
        assert writers == ["freedraft-saving"]
        made.saving.close()
        assert len(writers) == 1
        reply(made)
        made.saving.close()
        assert len(writers) == 2
        assert_equal(read_mixer(path), made.mixer)

    def test_not_at_every_step_of_a_busy_server(self, path, monkeypatch):
        monkeypatch.setattr(saving, "TOKENS", 1)
        writers = written_by(monkeypatch)
        made = fusion(save_learnt=str(path))
        reply(made)
        assert writers == []
        assert made.saving._thread is None

    def test_not_before_something_was_learnt(self, path):
        taught = fusion(save_learnt=str(path))
        reply(taught)
        taught.saving.close()
        # Not the time of the last reading, which a new drafter changes.
        before = path.stat().st_ino, path.stat().st_mtime_ns
        made = fusion(save_learnt=str(path))
        made.close(made.open(*ragged([PROMPT])))
        slots = made.open(*ragged([PROMPT]))
        made.extend(slots, *ragged([PROMPT]))
        made.saving.close()
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == before

    def test_not_while_rehearsing(self, path, monkeypatch):
        monkeypatch.setattr(saving, "TOKENS", 1)
        monkeypatch.setattr(saving, "SECONDS", 0)
        made = make_drafter("fusion", {"save_learnt": str(path), "learnt": str(path)}, rehearsing=True)
        reply(made)
        assert made.saving is None
        del made
        gc.collect()
        assert not path.exists()


def written_by(monkeypatch):
    """The names of the threads that write, a writing each."""
    seen = []

    def noted(mixer, path):
        seen.append(threading.current_thread().name)
        write_mixer(mixer, path)

    monkeypatch.setattr(saving, "write_mixer", noted)
    return seen


class TestTheNextProcess:
    def test_goes_on_where_the_last_one_ended(self, path):
        options = {"learnt": str(path), "save_learnt": str(path)}
        first = fusion(**options)
        assert is_as_shipped(first.mixer)
        reply(first)
        first.saving.close()
        second = fusion(**options)
        assert_equal(second.mixer, first.mixer)

    def test_the_same_file_by_another_way(self, path, monkeypatch):
        monkeypatch.setenv("HOME", str(path.parent))
        monkeypatch.chdir(path.parent)
        made = fusion(learnt="~/learnt.npz", save_learnt="learnt.npz")
        monkeypatch.chdir("/")
        reply(made)
        made.saving.close()
        assert_equal(fusion(learnt="~/learnt.npz").mixer, made.mixer)

    def test_a_missing_file_of_another_name_is_an_error(self, path):
        with pytest.raises(ConfigError, match=r"learnt: .*other"):
            fusion(learnt=str(path.with_name("other")), save_learnt=str(path))

    def test_a_damaged_one_is_too(self, path):
        path.write_text("notes of mine")
        with pytest.raises(ConfigError, match=r"learnt\.npz"):
            fusion(learnt=str(path), save_learnt=str(path))


def test_vllms_proposer_has_it_written(path, monkeypatch):
    for variable in OUTSIDE:
        monkeypatch.delenv(variable, raising=False)
    options = {"learnt": str(path), "save_learnt": str(path), "pacing": "off"}
    made = Proposer(vllm_config(options))
    batch = Batch(PROMPT)
    gc.collect()
    assert not path.exists()  # the drafter of the rehearsal is gone
    for token in REPLY:
        batch.commit(made, [token])
    # As the end of the process does.
    drafter = made._drafting.guard.drafter
    drafter.saving.close()
    assert_equal(read_mixer(path), drafter.mixer)
    assert not is_as_shipped(drafter.mixer)


class TestFailure:
    def test_it_is_said_once_counted_and_made_good(self, path, monkeypatch, caplog):
        monkeypatch.setattr(saving, "TOKENS", 1)
        monkeypatch.setattr(saving, "SECONDS", 0)
        folder = path.parent / "gone"
        folder.mkdir()
        made = fusion(save_learnt=str(folder / "file"))
        folder.rmdir()
        with caplog.at_level(logging.WARNING, "freedraft"):
            for _ in range(3):
                reply(made)
                made.saving._thread.join(COMPILING)
        assert [record.message.count("could not be written") for record in caplog.records] == [1]
        assert made.saving.failures >= 3
        folder.mkdir()
        made.saving.close()
        assert_equal(read_mixer(folder / "file"), made.mixer)

    def test_the_last_whole_file_stays(self, path, monkeypatch):
        made = fusion(save_learnt=str(path))
        reply(made)
        made.saving.close()
        before = path.read_bytes()

        def cut(file, **_):
            file.write(b"half")
            raise OSError("No space left on device")

        monkeypatch.setattr(np, "savez", cut)
        reply(made)
        made.saving.close()
        assert made.saving.failures == 1
        assert path.read_bytes() == before
        assert list(path.parent.iterdir()) == [path]

    def test_no_thread_to_be_had(self, path, monkeypatch):
        monkeypatch.setattr(saving, "TOKENS", 1)
        monkeypatch.setattr(saving, "SECONDS", 0)
        made = fusion(save_learnt=str(path))

        def refuse(thread):
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(threading.Thread, "start", refuse)
        reply(made)
        assert made.saving.failures == 1
        made.saving.close()
        assert_equal(read_mixer(path), made.mixer)

    def test_a_disk_that_hangs_does_not_hold_up_the_end(self, path, monkeypatch):
        monkeypatch.setattr(saving, "TOKENS", 1)
        monkeypatch.setattr(saving, "SECONDS", 0)
        monkeypatch.setattr(saving, "EXIT_SECONDS", 0.01)
        free = threading.Event()
        monkeypatch.setattr(saving, "write_mixer", lambda mixer, path: free.wait(COMPILING))
        made = fusion(save_learnt=str(path))
        reply(made)
        reply(made)
        made.saving.close()
        assert made.saving._is_writing()
        free.set()
        made.saving._thread.join(COMPILING)

    def test_a_folder_that_is_missing_is_told_at_once(self, path):
        with pytest.raises(ConfigError, match=r"save_learnt: .*nowhere/file"):
            fusion(save_learnt=str(path.parent / "nowhere" / "file"))
        with pytest.raises(ConfigError, match="save_learnt"):
            fusion(save_learnt=str(path.parent))

    def test_a_file_of_another_kind_is_not_written_over(self, path):
        path.write_text("notes of mine")
        with pytest.raises(ConfigError, match="save_learnt: will not write over it"):
            fusion(save_learnt=str(path))
        assert path.read_text() == "notes of mine"


def test_a_fork_does_not_write_what_its_parent_learnt(path):
    made = fusion(save_learnt=str(path))
    reply(made)
    child = os.fork()
    if child == 0:
        try:
            made.saving.close()
            assert not path.exists()
            reply(made)
            made.saving.close()
            assert path.exists()
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    made.saving.close()
    assert_equal(read_mixer(path), made.mixer)
