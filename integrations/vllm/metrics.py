"""Prometheus metrics of the proposer on vLLM's own `/metrics`, which another process serves.

vLLM proposes in a worker process and serves `/metrics` in the API server's. prometheus_client's way across processes
is a file a process, which the serving one reads at every scrape (https://prometheus.github.io/client_python/multiprocess).
vLLM itself uses it only with several API servers; then `PROMETHEUS_MULTIPROC_DIR` names its folder, and our file in it
is all that is needed. Otherwise the plug-in, which vLLM loads in the API server before it starts the workers, names a
folder of our own in an environment variable that they inherit, and adds that folder to the registry that is served.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import multiprocessing
import os
import secrets
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from freedraft.integrations.vllm.periodic import Periodic
from freedraft.integrations.vllm.statistics import Statistics, source_name

if TYPE_CHECKING:
    # Every process of vLLM loads this module, and none needs to load Numba for that.
    from freedraft.plugins.pacing import Pacer

OWN_FOLDER = "FREEDRAFT_METRICS_DIR"
VLLM_FOLDER = "PROMETHEUS_MULTIPROC_DIR"

logger = logging.getLogger("freedraft")

COUNTERS = {
    "steps": "Engine steps in which freedraft was asked for drafts.",
    "sequence_steps": "Sequences' shares in engine steps, those without a draft included.",
    "tokens": "Tokens committed in these; tokens / sequence_steps is the mean over all steps.",
    "taken_tokens": "Tokens handed to the drafter, prompts included.",
    "opened_sequences": "Sequences begun by the drafter, those built anew included.",
    "draft_tokens": "Tokens given to vLLM to verify, by source; it drops those of a request that has just ended.",
    "withheld_tokens": "Tokens drafted and not verified, for it would not have paid.",
    "accepted_tokens": "Drafted tokens that were accepted, by source.",
    "paced_steps": "Engine steps that had a draft: verified or plain, as pacing thought best, or explored: the other.",
    "draft_seconds": "Seconds spent in drafting.",
    "errors": "Failures in drafting; each cost some drafts, none an answer.",
}
GAUGES = {
    "sequences": "Sequences in the last engine step.",
    "pacing_gain": "Tokens a second of the latest steps, as a multiple of plain decoding's, as pacing expects.",
}

Labels = tuple[tuple[str, str], ...]

_serial = itertools.count()
# The folder that this process serves.
_served: str | None = None


def folder() -> Path | None:
    """Where this process' metrics go; None when nobody would read them."""
    path = os.environ.get(VLLM_FOLDER) or os.environ.get(OWN_FOLDER)
    return Path(path) if path else None


class MetricsFile:
    """The metrics of one proposer, in a file that the API server reads."""

    def __init__(self, path: Path, labels: Mapping[str, str]) -> None:
        """Create the file in the folder `path`.

        Raises:
            ImportError: prometheus_client is not installed; vLLM depends on it.
            OSError: the folder can't be written.
        """
        from prometheus_client import mmap_dict

        # It has no type hints that a checker could use.
        library: Any = mmap_dict

        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        # One number a process is not enough: a process may hold several engines.
        name = f"{os.getpid()}-freedraft{next(_serial)}"
        self._counters = library.MmapedDict(str(path / f"counter_{name}.db"))
        self._gauges = library.MmapedDict(str(path / f"gauge_livesum_{name}.db"))
        self._labels = dict(labels)
        self._key = library.mmap_key
        self._keys: dict[tuple[str, Labels], str] = {}
        self._counted: dict[tuple[str, Labels], float] = {}
        self._gauged: set[str] = set()

    def end(self) -> None:
        """Take the gauges back; what was counted stays."""
        for name in sorted(self._gauged):
            self._gauge(name, 0)

    def write(self, now: Statistics, pacer: Pacer | None = None) -> None:
        """Write the totals, and where drafts are paced what came of that; costs about a microsecond each."""
        self._count("steps", now.steps)
        self._count("sequence_steps", now.sequence_steps)
        self._count("tokens", now.tokens)
        self._count("taken_tokens", now.taken)
        self._count("opened_sequences", now.opened)
        self._count("withheld_tokens", now.withheld)
        self._count("draft_seconds", now.seconds)
        self._count("errors", now.errors)
        for source in now.drafted.nonzero()[0].tolist():
            name = source_name(source)
            self._count("draft_tokens", int(now.drafted[source]), ("source", name))
            self._count("accepted_tokens", int(now.accepted[source]), ("source", name))
        self._gauge("sequences", now.sequences)
        if pacer is not None:
            for decision, steps in pacer.decisions.items():
                self._count("paced_steps", steps, ("decision", decision))
            self._gauge("pacing_gain", pacer.gain)

    def _count(self, name: str, value: float, *labels: tuple[str, str]) -> None:
        if self._counted.get((name, labels)) == value:
            return
        self._counted[name, labels] = value
        metric = f"freedraft:{name}"
        self._counters.write_value(self._named(metric, f"{metric}_total", COUNTERS[name], labels), value, 0.0)

    def _gauge(self, name: str, value: float) -> None:
        metric = f"freedraft:{name}"
        self._gauged.add(name)
        self._gauges.write_value(self._named(metric, metric, GAUGES[name], ()), value, 0.0)

    def _named(self, metric: str, sample: str, text: str, labels: Labels) -> str:
        key = self._keys.get((sample, labels))
        if key is None:
            every = {**self._labels, **dict(labels)}
            key = self._keys[sample, labels] = self._key(metric, sample, [*every], [*every.values()], text)
        return key


class PeriodicMetrics:
    """Writes a proposer's metrics four times a second, as long as something happens; that is no part of a step.

    Who asks for the metrics sees them as they were a quarter of a second before, at most.

    Args:
        file: where they go.
        statistics: of the proposer; written at once, at zero, so that the first increase is seen as one.
        pacer: None where drafts are not paced.
    """

    INTERVAL = 0.25

    def __init__(self, file: MetricsFile, statistics: Statistics, pacer: Pacer | None = None) -> None:
        self._file = file
        self._statistics = statistics
        self._pacer = pacer
        self._written = (-1, 0.0)
        self._failed = False
        self._write()
        self._writing = Periodic(self.INTERVAL, self._write, "freedraft-metrics", self._write_last)

    def end(self) -> None:
        """Write the last of them, and take the gauges back."""
        self._writing.end()

    def _write_last(self) -> None:
        self._write()
        if not self._failed:
            self._file.end()

    def _write(self) -> None:
        # The time of a step is noted last.
        now = self._statistics.steps, self._statistics.seconds
        if self._failed or now == self._written:
            return
        try:
            self._file.write(self._statistics, self._pacer)
            self._written = now
        except Exception:
            logger.warning("freedraft: no metrics from now on", exc_info=True)
            self._failed = True


class Collector:
    """What prometheus_client's registry asks at every scrape: the files of our own folder, summed over processes."""

    def __init__(self) -> None:
        self._failed = False

    def collect(self) -> Iterable[Any]:
        """The metrics of all proposers of this server."""
        from prometheus_client import multiprocess

        library: Any = multiprocess
        path = os.environ.get(OWN_FOLDER)
        if not path or not os.path.isdir(path):
            return []
        try:
            return list(library.MultiProcessCollector(None, path).collect())
        except Exception:
            # vLLM's own metrics are in the same answer.
            if not self._failed:
                logger.warning("freedraft: its metrics can't be read in %s (logged once)", path, exc_info=True)
            self._failed = True
            return []

    def describe(self) -> Iterable[Any]:
        """Nothing is known before there is a proposer."""
        return []


def serve() -> None:
    """Make this process serve the metrics of the workers that it will start; does so once.

    Nobody knows yet whether they will draft: vLLM loads plug-ins before it reads its configuration. Where vLLM has a
    folder of its own there is nothing to do.

    A worker, which vLLM starts with multiprocessing, writes into the folder that its parent serves. A server that a
    program with a folder of its own starts, a notebook say, inherits the variable all the same, and must not heed it.
    """
    global _served
    if os.environ.get(VLLM_FOLDER):
        return
    folder_named = os.environ.get(OWN_FOLDER)
    if folder_named and (folder_named == _served or multiprocessing.parent_process() is not None):
        return
    from prometheus_client import REGISTRY

    # The folder is only named here: the first proposer makes it, so that a vLLM without freedraft leaves no trace.
    path = os.path.join(_temporary(), f"freedraft-{secrets.token_hex(8)}")
    REGISTRY.register(Collector())
    os.environ[OWN_FOLDER] = _served = path
    atexit.register(_remove, path, os.getpid())


def _temporary() -> str:
    """As `tempfile.gettempdir`, but that one writes a file to see whether it can."""
    named = [os.environ.get(variable) for variable in ("TMPDIR", "TEMP", "TMP")]
    candidates = [path for path in (*named, "/tmp", "/var/tmp", "/usr/tmp") if path]
    return os.path.abspath(next((path for path in candidates if os.access(path, os.W_OK | os.X_OK)), "."))


def _remove(path: str, process: int) -> None:
    # A forked child inherits this, and must leave the folder to its parent.
    if os.getpid() == process:
        shutil.rmtree(path, ignore_errors=True)
