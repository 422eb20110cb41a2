"""Where segments are built: in this process, in others on this machine, or on a Ray cluster; the result is the same."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from freedraft.retrieval.build.extras import require
from freedraft.retrieval.errors import CapacityError, FreedraftError, InputError
from freedraft.retrieval.index.construct import BUILD_BYTES_A_TOKEN
from freedraft.retrieval.index.documents import Documents
from freedraft.retrieval.index.manifest import SegmentEntry
from freedraft.retrieval.index.store import write_segment

RAY_RETRIES = 3

Task = tuple[Path, Documents]
Entries = Generator[SegmentEntry, None, None]
Execute = Callable[[Iterable[Task], int], Entries]
"""Takes tasks, one at a time as they can be worked on, and the smallest count; writes the segments in any order, and
yields their entries in the tasks' order."""


def in_this_process(tasks: Iterable[Task], min_count: int) -> Entries:
    """Build one segment after another."""
    for path, documents in tasks:
        yield write_segment(path, documents, min_count)


def in_processes(workers: int) -> Execute:
    """Build `workers` segments at a time, each in a process of its own, while this one prepares the next."""

    def execute(tasks: Iterable[Task], min_count: int) -> Entries:
        context = multiprocessing.get_context("spawn")
        stop, keep = context.Pipe(duplex=False)
        pool = ProcessPoolExecutor(workers, context, _follow_parent, (stop,))
        running: deque[Future[SegmentEntry]] = deque()
        try:
            for path, documents in tasks:
                running.append(pool.submit(write_segment, path, documents, min_count))
                if len(running) > workers:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        except BrokenProcessPool as error:
            raise CapacityError(
                f"a worker process died while it built a segment, perhaps for want of memory: "
                f"lower --max-memory, or --workers (now {workers})"
            ) from error
        except BaseException:
            # After an error or Ctrl-C nobody wants what is still being built: this ends the workers at once.
            keep.close()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            keep.close()
            stop.close()

    return execute


def on_ray(address: str, workers: int | None, segment_tokens: int) -> Execute:
    """Build segments as tasks of a Ray cluster, and write their files here.

    A task whose worker dies is tried again, `RAY_RETRIES` times. The nodes need freedraft installed, but no folder that
    they share with this machine.

    Args:
        address: as `ray.init` takes it: "auto", "host:port", "ray://host:port", "local".
        workers: tasks at a time; None = as many as the cluster has CPUs.
        segment_tokens: of the largest segment; Ray gives a task the memory for it.
    """

    def execute(tasks: Iterable[Task], min_count: int) -> Entries:
        ray = require("ray", "building on a cluster")
        ours = not ray.is_initialized()
        if ours:
            try:
                ray.init(address, log_to_driver=False, logging_level="ERROR")
            except (ConnectionError, ValueError, RuntimeError, OSError) as error:
                raise InputError(f"--ray {address}: no cluster answers there: {str(error).splitlines()[0]}") from error
        running: deque[tuple[Path, Any]] = deque()
        try:
            memory = segment_tokens * BUILD_BYTES_A_TOKEN
            largest = max((node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"]), default=0)
            if memory > largest:
                raise InputError(
                    f"--max-memory: a segment needs {memory >> 20} MiB to build, the largest node of the cluster "
                    f"offers {int(largest) >> 20} MiB"
                )
            build = ray.remote(num_cpus=1, memory=memory, max_retries=RAY_RETRIES)(build_apart)
            limit = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
            for path, documents in tasks:
                running.append((path, build.remote(path.name, documents, min_count)))
                if len(running) > limit:
                    yield _fetch(ray, *running.popleft())
            while running:
                yield _fetch(ray, *running.popleft())
        finally:
            for _, reference in running:
                ray.cancel(reference, force=True)
            if ours:
                ray.shutdown()

    return execute


def build_apart(name: str, documents: Documents, min_count: int) -> tuple[SegmentEntry, bytes]:
    """Build a segment away from its index: its entry, and its file's bytes."""
    with tempfile.TemporaryDirectory() as folder:
        entry = write_segment(Path(folder) / name, documents, min_count)
        return entry, (Path(folder) / name).read_bytes()


def _fetch(ray: Any, path: Path, reference: Any) -> SegmentEntry:
    try:
        entry, content = ray.get(reference)
    except FreedraftError:
        raise
    except ray.exceptions.RayError as error:
        raise CapacityError(
            f"a segment could not be built on the cluster, tried {1 + RAY_RETRIES} times: {str(error).splitlines()[0]}"
        ) from error
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return entry


def _follow_parent(stop: Connection) -> None:
    """In a worker: leave Ctrl-C to the parent, and end when the pipe's other end closes, which its death does too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        wait([stop])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
