"""Count the cache lines that a step of drafting touches: what bounds it once a batch outgrows the caches.

Runs the suffix automaton's own kernels uncompiled, on an arena that writes down every 64-byte line it is asked for.

    python bench/cache_lines.py [--context N] [--steps N] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

os.environ["NUMBA_DISABLE_JIT"] = "1"

import numpy as np
from harness import save, show
from texts import library_tokens

from freedraft.plugins.registry import make_drafter

LINE_BYTES = 64


class Recorded(np.ndarray):  # type: ignore[type-arg]
    """An int32 array that adds the line of every element read or written to `Recorded.lines`."""

    lines: set[int] = set()  # noqa: RUF012

    def _note(self, key: Any) -> None:
        place = key if isinstance(key, tuple) else (key,)
        if any(isinstance(index, slice) for index in place):
            return
        offset = sum(int(index) * step for index, step in zip(place, self.strides, strict=False))
        Recorded.lines.add((self.__array_interface__["data"][0] + offset) // LINE_BYTES)

    def __getitem__(self, key: Any) -> Any:
        got = super().__getitem__(key)
        if not isinstance(got, np.ndarray):
            self._note(key)
            return int(got)
        return got

    def __setitem__(self, key: Any, value: Any) -> None:
        self._note(key)
        super().__setitem__(key, value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    text = library_tokens(chosen.context + 2 * chosen.steps)
    drafter = make_drafter(
        "suffix_automaton", {"memory": "64MiB", "max_tokens": 8, "min_probability": 0, "min_expected": 0}
    )
    automata = drafter.automata  # type: ignore[attr-defined]
    slots = drafter.open(text[: chosen.context], np.array([0, chosen.context]))
    automata._words = automata._words.view(Recorded)
    automata._sequences = automata._sequences.view(Recorded)
    extend, draft, both = [], [], []
    for step in range(chosen.steps):
        at = chosen.context + 2 * step
        Recorded.lines = set()
        drafter.extend(slots, text[at : at + 2], np.array([0, 2]))
        committed = Recorded.lines
        Recorded.lines = set()
        drafter.draft(slots, np.array([8], np.int32))
        extend.append(len(committed))
        draft.append(len(Recorded.lines))
        both.append(len(committed | Recorded.lines))
    parts = {"commit 2 tokens": extend, "draft 8 tokens": draft, "a step": both}
    rows = [
        {"part": name, "mean": float(np.mean(n)), "median": float(np.median(n)), "99 %": float(np.percentile(n, 99))}
        for name, n in parts.items()
    ]
    show(f"distinct {LINE_BYTES}-byte lines touched, one sequence of {chosen.context} tokens", rows)
    what = "distinct cache lines of the arena and headers that a step touches, one sequence"
    print("written to", save("cache_lines", {"what": what, "context": chosen.context, "results": rows}, chosen.out))


if __name__ == "__main__":
    main()
