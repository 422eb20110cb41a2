"""Time the proposer alone, on arrays like those that vLLM's engine passes, beside vLLM's own n-gram proposer.

First 256 rows at 32k tokens that commit 2 tokens a step, the proposers taking turns at every step; then sixteen prompts
of 32k tokens that arrive at once, as the slowest step while they are taken in. One thread. Nothing paces the drafts, so
that all of them are in the time; `fusion` is the default drafter.

    python bench/vllm_proposer.py [--quick] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("NUMBA_NUM_THREADS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import numpy as np
from harness import median, save, show, timed
from texts import library_tokens

from freedraft.integrations.vllm import Proposer

DRAFTED, COMMITTED, VOCABULARY = 8, 2, 1 << 20
DRAFTERS = ("fusion", "suffix_automaton", "prompt_lookup")
OPTIONS = {"memory": "4GiB", "pacing": "off"}


class Engine:
    """vLLM's side: rows of text that grow by what the model would have committed."""

    def __init__(self, rows: int, context: int, steps: int) -> None:
        self.width = context + (steps + 1) * COMMITTED + DRAFTED + 1
        source = library_tokens(min(4_000_000, rows * self.width))
        starts = np.linspace(0, len(source) - self.width, rows).astype(np.int64)
        self.tokens = np.stack([source[start : start + self.width] for start in starts])
        self.length = np.full(rows, context, np.int32)
        self.rows = rows

    def commit(self, count: int) -> list[list[int]]:
        new = [self.tokens[i, n : n + count].tolist() for i, n in enumerate(self.length)]
        self.length += count
        return new

    def config(self, **freedraft: Any) -> Any:
        """The parts of vLLM's configuration that the proposers read."""
        return SimpleNamespace(
            model_config=SimpleNamespace(
                max_model_len=self.width, get_vocab_size=lambda: VOCABULARY, served_model_name="bench"
            ),
            speculative_config=SimpleNamespace(
                num_speculative_tokens=DRAFTED, prompt_lookup_min=2, prompt_lookup_max=5
            ),
            scheduler_config=SimpleNamespace(max_num_seqs=self.rows),
            parallel_config=SimpleNamespace(tensor_parallel_size=1, data_parallel_index=0),
            additional_config={"freedraft": freedraft},
        )


def steady(rows: int, context: int, steps: int, drafter: str) -> list[dict[str, Any]]:
    """Milliseconds a step when all prompts have been taken in."""
    from vllm.v1.spec_decode.ngram_proposer import NgramProposer

    engine = Engine(rows, context, 2 * steps + 40)
    ours = Proposer(engine.config(**OPTIONS, drafter=drafter, vllm={"step_tokens": 1 << 20, "log_interval": 0}))
    theirs = NgramProposer(engine.config())
    while ours.statistics.taken < rows * context:
        ours.propose([[]] * rows, engine.length, engine.tokens)
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    drafted = {"ours": 0, "theirs": 0}
    for step in range(steps + 20):
        new = engine.commit(COMMITTED)

        def our_step(new: list[list[int]] = new) -> None:
            drafted["ours"] += sum(map(len, ours.propose(new, engine.length, engine.tokens)))

        def their_step(new: list[list[int]] = new) -> None:
            drafted["theirs"] += sum(map(len, theirs.propose(DRAFTED, new, engine.length, engine.tokens)))

        seconds = {"ours": timed(our_step), "theirs": timed(their_step)}
        if step >= 20:
            for name, value in seconds.items():
                times[name].append(1e3 * value)
    assert ours.statistics.errors == 0
    base = median(times["theirs"])
    names = {"ours": f"freedraft {drafter}", "theirs": "vLLM ngram 2..5"}
    return [
        {
            "rows": rows,
            "context": context,
            "proposer": names[name],
            "median ms": median(values),
            "worst ms": max(values),
            "times vLLM's": median(values) / base,
            "drafted a row": drafted[name] / rows / (steps + 20),
        }
        for name, values in times.items()
    ]


def arrival(prompts: int, context: int, running: int, drafter: str) -> dict[str, Any]:
    """The slowest step while prompts of `context` tokens arrive at once beside `running` rows that decode."""
    rows = prompts + running
    engine = Engine(rows, context, 200)
    ours = Proposer(engine.config(**OPTIONS, drafter=drafter, vllm={"log_interval": 0}))
    before = min(2000, context)
    engine.length[:running] = before
    everyone = engine.length.copy()
    engine.length[running:] = 0
    while ours.statistics.taken < running * before:
        ours.propose([[]] * running, engine.length, engine.tokens)
    engine.length[:] = everyone
    times = []
    while ours.statistics.taken < int(engine.length.sum()):
        new = engine.commit(1)
        times.append(1e3 * timed(lambda new=new: ours.propose(new, engine.length, engine.tokens)))
    assert ours.statistics.errors == 0
    return {
        "prompts": prompts,
        "tokens each": context,
        "rows beside": running,
        "proposer": f"freedraft {drafter}",
        "steps": len(times),
        "median ms": median(times),
        "worst ms": max(times),
    }


def main() -> None:
    """Parse, run, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--out", type=Path, help="folder for the result file")
    options = parser.parse_args()
    rows, context, steps = (8, 1000, 10) if options.quick else (256, 32_768, 200)
    table, arrivals = [], []
    for drafter in DRAFTERS:
        table += steady(rows, context, steps, drafter)
        arrivals.append(arrival(16, context, 16, drafter))
    show("One engine step", table)
    show("Prompts that arrive at once", arrivals, "step_tokens 8192, the default")
    if not options.quick:
        save("vllm_proposer", {"steady": table, "arrival": arrivals}, options.out)


if __name__ == "__main__":
    main()
