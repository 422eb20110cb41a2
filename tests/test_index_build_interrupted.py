"""A build that is interrupted: the old index whole, nothing left over, no process left behind."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from tiny_tokenizer import WORDS, make_tokenizer

from freedraft.retrieval.build.builder import build_index
from freedraft.retrieval.build.limits import MAIN_BYTES, SMALLEST_SEGMENT, WORKER_BYTES
from freedraft.retrieval.build.tokenize import Tokenizer
from freedraft.retrieval.index.construct import BUILD_BYTES_A_TOKEN
from freedraft.retrieval.index.store import CorpusIndex

PATIENCE = 90
# A shell's background job, as these tests may be, ignores Ctrl-C and passes that on to what it starts.
MAIN = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
MAIN += "from freedraft.integrations.cli import main; main()"
COMMAND = [sys.executable, "-c", MAIN, "index", "build"]


def until(condition):
    """Wait for a condition, and fail if it never comes."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def group_is_gone(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def content(folder):
    return [(name, tokens.tolist()) for segment in CorpusIndex(folder).segments for name, tokens in segment.documents()]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("blow", [signal.SIGINT, signal.SIGKILL], ids=lambda blow: blow.name)
def test_half_way(tmp_path, workers, blow):
    folder = tmp_path / "index"
    tokenizer = Tokenizer(make_tokenizer(tmp_path / "tokenizer"))
    (tmp_path / "old.txt").write_text("the cat sat on the mat")
    build_index(folder, [tmp_path / "old.txt"], tokenizer)
    before, files = content(folder), set(folder.iterdir())

    # Standard input stays open, so the build cannot end by itself; small segments, so it has written some by then.
    processes = workers if workers > 1 else 0
    memory = MAIN_BYTES + processes * WORKER_BYTES + 4 * workers * SMALLEST_SEGMENT * BUILD_BYTES_A_TOKEN
    source = random.Random(0)
    text = "\n".join(" ".join(source.choice(WORDS) for _ in range(20)) for _ in range(40_000)) + "\n"
    options = ["--tokenizer", str(tokenizer.path), "--replace", "--workers", str(workers), "--max-memory", str(memory)]
    process = subprocess.Popen(
        [*COMMAND, str(folder), "-", *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdin is not None
        process.stdin.write(text)
        process.stdin.flush()
        until(lambda: process.poll() is not None or set(folder.glob("*.segment")) - files)
        assert process.poll() is None
        assert content(folder) == before

        # To the group, as a terminal's Ctrl-C; a kill goes to the build alone, and its workers must notice.
        if blow is signal.SIGINT:
            os.killpg(process.pid, blow)
        else:
            process.send_signal(blow)
        process.stdin.close()
        process.wait(PATIENCE)
        until(lambda: group_is_gone(process.pid))
        said = process.stderr.read()
    finally:
        if not group_is_gone(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert content(folder) == before
    if blow is signal.SIGINT:
        assert process.returncode == 130
        assert "Traceback" not in said
        assert {path for path in folder.iterdir() if path.suffix == ".segment"} <= files
    # What a killed build leaves goes with the next command.
    build_index(folder, [tmp_path / "old.txt"], tokenizer, overwrite=True)
    assert len(list(folder.glob("*.segment"))) == 1
    assert content(folder) == before
