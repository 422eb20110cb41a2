"""Which kernels a proposer compiles after its start, for each of several configurations: a script for a fresh process.

Each configuration has a process of its own, forked while everything is imported and nothing is compiled yet.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import threading
from collections.abc import Iterable
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

import drafters
import numpy as np
import vllm.distributed.parallel_state
import vllm.platforms
import vllm.v1.sample.rejection_sampler  # noqa: F401
from numba.core.dispatcher import Dispatcher
from vllm_stand_in import Batch, vllm_config

from freedraft.integrations.vllm import proposer, tap
from freedraft.plugins.pacing import Pacer
from freedraft.plugins.step_time import StepTime


def signatures() -> dict[str, int]:
    modules = [module for name, module in sys.modules.items() if name.startswith("freedraft.")]
    found = {value for module in modules for value in vars(module).values() if isinstance(value, Dispatcher)}
    return {f"{kernel.py_func.__module__}.{kernel.py_func.__qualname__}": len(kernel.signatures) for kernel in found}


def compiled_late(options: dict[str, Any]) -> list[str]:
    assert not any(signatures().values())
    with (
        mock.patch.object(tap, "LogitsTap", tap.MadeUpRankings),
        mock.patch.object(proposer, "LogitsTap", tap.MadeUpRankings),
    ):
        asked = proposer.Proposer(vllm_config(options))
    ready = signatures()
    batch = Batch([1, 2, 3, 4, 1, 2], [5, 5, 5], [7])
    for step in range(30):
        batch.commit(asked, [3 + step % 4], [5, 5] if step % 7 == 0 else [5], [] if step < 3 else [step % 4])
    batch.texts[0] += [9, 9, 8]
    batch.commit(asked, [5], [6], [7])
    batch.texts = batch.texts[:1]
    for _ in range(12):
        batch.commit(asked, [1])
    assert asked.statistics.errors == 0
    if asked._drafting.pacer is not None:
        # Above, the machine's speed decides what of a draft is verified; here a part of it is.
        pacer = Pacer()
        pacer.step_time = StepTime.known(lambda n: 1.0 + 0.85 * (n - 1))
        assert len(pacer.cut(drafters.chain([5, 6]), 1).tokens) == 1
        for padded in (False, True):
            # And of a tree all is, or what a tree brings is not worth it.
            for price in (0.01, 0.85):
                pacer.step_time = StepTime.known(lambda n, price=price: 1.0 + price * (n - 1))
                cut = pacer.cut(drafters.tree([(5, -1), (6, -1), (7, 0)]), 1, padded=padded)
                pacer.judge(cut.probability, cut.offsets, np.array([0]), cut.parents)
    return sorted(name for name, count in signatures().items() if count != ready.get(name, 0))


def send_compiled_late(options: dict[str, Any], to: Connection) -> None:
    to.send(compiled_late(options))


def in_forks(configurations: Iterable[dict[str, Any]]) -> list[list[str] | None]:
    """`compiled_late` of each, None where it failed; then its traceback is in stderr."""
    assert threading.active_count() == 1, "a fork takes no thread along"
    fork = multiprocessing.get_context("fork")
    results: list[list[str] | None] = []
    for options in configurations:
        receiving, sending = fork.Pipe(duplex=False)
        process = fork.Process(target=send_compiled_late, args=(options, sending))
        process.start()
        sending.close()
        try:
            results.append(receiving.recv())
        except EOFError:
            results.append(None)
        process.join()
    return results


if __name__ == "__main__":
    # vLLM's log may be on stdout, too: the last line is ours.
    print(json.dumps(in_forks(json.loads(sys.argv[1]))))
