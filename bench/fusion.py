"""Cost of an engine step of fusion for a batch with long contexts: commit, draft, and cut to what pays.

Each row commits 2 tokens and is drafted for, as in `bench/drafting.py`. Times are the thread's CPU time, which other
programs on the machine disturb less; drafting is also timed by the clock, with one thread and with two, the two taking
turns. Texts: the Python standard library's sources.

    python bench/fusion.py [--rows 256] [--context 32768] [--steps 40] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any

os.environ.setdefault("NUMBA_NUM_THREADS", "1")

import numpy as np
from harness import median, save, show
from texts import library_tokens

from freedraft.plugins.base import Drafts
from freedraft.plugins.fusion import Fusion, FusionSettings
from freedraft.plugins.pacing import Pacer
from freedraft.plugins.step_time import StepTime
from freedraft.plugins.threads import Threads

COMMITTED = 2
THREADS = {1: Threads(1), 2: Threads(2)}


def timed(call: Callable[[], Any]) -> float:
    """CPU seconds of this thread that one call takes."""
    started = thread_time()
    call()
    return thread_time() - started


def measure(rows: int, context: int, steps: int, budget: int, scope: Any) -> dict[str, Any]:
    """Medians over `steps` engine steps, every other of which drafts with two threads."""
    text = library_tokens(3_000_000)
    span = context + (steps + 2) * COMMITTED
    starts = np.random.default_rng(0).integers(0, len(text) - span, rows)
    made = Fusion(FusionSettings(memory=2**33, scope=scope))
    # Earlier replies, for the sequences to be followed through.
    for at in range(0, 400_000 if scope == "engine" else 0, 1000):
        slots = made.open(text[:0], np.zeros(2, np.int64))
        made.draft(slots, np.zeros(1, np.int32))
        made.extend(slots, text[at : at + 1000], np.array([0, 1000]))
        made.close(slots)
    pacer = Pacer()
    pacer.step_time = StepTime.known(lambda n: max(1.0, n / 300))
    slots = made.open(
        np.concatenate([text[start : start + context] for start in starts]), np.arange(rows + 1) * context
    )
    limits = np.full(rows, budget, np.int32)
    offsets = np.arange(rows + 1) * COMMITTED
    taken: dict[str, list[float]] = {"commit": [], "floor": [], "draft": [], "pace": []}
    by_clock: dict[int, list[float]] = {1: [], 2: []}
    drafted = kept = 0
    for step in range(steps + 2):
        at = context + step * COMMITTED
        new = np.concatenate([text[start + at : start + at + COMMITTED] for start in starts])
        threads = 1 + step % 2
        made.threads = THREADS[threads]
        found: list[Drafts] = []
        times = {"floor": timed(lambda: setattr(made, "floor", pacer.floor(rows, rows * budget)))}
        started = perf_counter()
        times["draft"] = timed(lambda found=found: found.append(made.draft(slots, limits)))
        ended = perf_counter()
        times["pace"] = timed(lambda found=found: found.append(pacer.cut(found[0], rows)))
        times["commit"] = timed(lambda new=new: made.extend(slots, new, offsets))
        if step >= 2:  # the first compile, and find where each sequence is in the earlier replies
            by_clock[threads].append(ended - started)
            for name, seconds in times.items() if threads == 1 else ():
                taken[name].append(seconds)
            drafted += len(found[0].tokens)
            kept += len(found[1].tokens)
    total = [sum(parts) for parts in zip(*taken.values(), strict=True)]
    return {
        "rows": rows,
        "context": context,
        "scope": scope,
        "budget": budget,
        **{f"{name}, ms": round(1e3 * median(seconds), 3) for name, seconds in taken.items()},
        "in all, ms": round(1e3 * median(total), 3),
        "us a row": round(1e6 * median(total) / rows, 2),
        "draft, times faster with 2 threads": round(median(by_clock[1]) / median(by_clock[2]), 2),
        "drafted a row": round(drafted / rows / steps, 2),
        "verified a row": round(kept / rows / steps, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    measure(2, 256, 2, 8, "engine")
    rows = [
        measure(count, chosen.context, chosen.steps, budget, scope)
        for count in (1, chosen.rows)
        for budget in (8, 24)
        for scope in ("off", "engine")
    ]
    show("fusion", rows)
    print("written to", save("fusion", {"committed a row": COMMITTED, "results": rows}, chosen.out))


if __name__ == "__main__":
    main()
