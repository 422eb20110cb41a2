"""Cost of text made to be hard, as a ratio to ordinary text of the same length: intake a token, and a step.

python bench/adversarial.py [--length N] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from harness import median, save, show, timed
from texts import library_tokens

from freedraft.plugins.registry import make_drafter

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import naive

STEPS, REPEATS = 300, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    length = chosen.length + 2 * STEPS
    texts = {
        "ordinary": library_tokens(length),
        "one token": [5] * length,
        **{f"period {p}": (list(range(p)) * (length // p + 1))[:length] for p in (2, 3, 8, 64)},
        "Fibonacci word": naive.fibonacci_word(length),
        "de Bruijn word": naive.de_bruijn(2, length.bit_length())[:length],
        "random, 2 symbols": np.random.default_rng(0).integers(0, 2, length),
        "random, 50,000 symbols": np.random.default_rng(0).integers(0, 50_000, length),
        "run, then another": [1] * (length // 2) + [2] * (length - length // 2),
    }
    drafter = make_drafter("suffix_automaton", {"memory": "256MiB", "min_probability": 0, "min_expected": 0})
    budget = np.array([8], np.int32)
    offsets = np.array([0, 2])
    taken: dict[str, tuple[list[float], list[float], list[float]]] = {name: ([], [], []) for name in texts}
    for _ in range(REPEATS):
        for name, values in texts.items():
            text = np.array(values, np.int32)
            intake, steps, used = taken[name]
            prompt, bounds = text[: chosen.length], np.array([0, chosen.length])
            opened: list[Any] = []
            intake.append(timed(lambda p=prompt, b=bounds, o=opened: o.append(drafter.open(p, b))) / chosen.length)
            slots = opened[0]

            def step(at: int, text: Any = text, slots: Any = slots) -> None:
                drafter.extend(slots, text[at : at + 2], offsets)
                drafter.draft(slots, budget)

            steps += [timed(lambda at=at, step=step: step(at)) for at in range(chosen.length, length - 1, 2)]
            used.append(drafter.automata.memory_used / length)  # type: ignore[attr-defined]
            drafter.close(slots)
    plain_intake, plain_step, _ = (median(values) for values in taken["ordinary"])
    rows = [
        {
            "text": name,
            "intake, ns a token": round(median(intake) * 1e9, 1),
            "x ordinary": round(median(intake) / plain_intake, 2),
            "step, us": round(median(steps) * 1e6, 2),
            "x ordinary ": round(median(steps) / plain_step, 2),
            "slowest step, us": round(max(steps) * 1e6, 1),
            "bytes a token": round(median(used), 1),
        }
        for name, (intake, steps, used) in taken.items()
    ]
    show(f"{chosen.length} tokens taken in, then steps that commit 2 and draft 8", rows)
    print("written to", save("adversarial", {"length": chosen.length, "results": rows}, chosen.out))


if __name__ == "__main__":
    main()
