"""A drafting step that costs the host one driver call for each kernel: the scan, then each segment of the indexes."""

from __future__ import annotations

from typing import Any

from freedraft.retrieval.cuda.corpus_on_gpu import THREADS as CORPUS_THREADS
from freedraft.retrieval.cuda.corpus_on_gpu import DeviceCorpus
from freedraft.retrieval.cuda.launching import PreparedLaunch
from freedraft.retrieval.cuda.on_gpu import DeviceScan
from freedraft.retrieval.cuda.rules import Rules
from freedraft.retrieval.errors import InputError


class PreparedStep:
    """Launches what `DeviceScan.launch` and `DeviceCorpus.launch` would, over the same arrays at every step."""

    def __init__(
        self,
        scan: DeviceScan,
        scan_launch: PreparedLaunch,
        corpus: DeviceCorpus | None,
        corpus_launches: list[PreparedLaunch],
    ) -> None:
        self._scan, self._scan_launch = scan, scan_launch
        self._corpus, self._corpus_launches = corpus, corpus_launches

    def __call__(self, batch: int, rows: int, active: int, budget: int, stream: int) -> None:
        """Launch the drafting of a batch; returns before it is done.

        Args:
            batch: rows, no more than the arrays have.
            rows: address on the device, int64 `(batch,)`: the slot of each batch row.
            active: address on the device, int32 `(batch,)`: 0 = no draft for this row.
            budget: tokens to draft, at most.
            stream: the handle of a CUDA stream.

        Raises:
            InputError: more rows than the arrays have.
            LaunchError: the driver refused.
        """
        if batch > self._scan.batch:
            raise InputError(f"prepared step: made for {self._scan.batch} rows, got {batch}")
        if batch < 1:
            return
        for launch in (self._scan_launch, *self._corpus_launches):
            launch.change("rows", rows)
            launch.change("active", active)
            launch.change("budget", budget)
        self._scan_launch(self._scan.grid(batch), self._scan.threads, stream)
        if self._corpus is not None:
            for launch in self._corpus_launches:
                launch(self._corpus.grid(batch), CORPUS_THREADS, stream)


def prepared_step(
    scan: DeviceScan, corpus: DeviceCorpus | None, inputs: tuple[Any, ...], outputs: tuple[Any, ...], rules: Rules
) -> PreparedStep | None:
    """The step over these arrays of the largest batch; None where Numba has to launch the kernels."""
    scan_launch = scan.prepare(inputs, outputs, rules)
    launches = [] if corpus is None else corpus.prepare(inputs, outputs, rules)
    ready = [launch for launch in launches if launch is not None]
    if scan_launch is None or len(ready) < len(launches):
        return None
    return PreparedStep(scan, scan_launch, corpus, ready)
