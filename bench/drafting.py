"""Time an engine step of drafting (commit 2 tokens, draft 8) beside the peers, and a prompt's intake.

Everything runs on one thread, in one process. First the drafters take turns at every step, so that a noisy machine is
noisy for all, and each finds the caches full of the others' data, as after a model's forward pass on a CPU. Then each
runs its steps back to back, as beside a model on an accelerator. All draft for the same sequences and commit the same
text.

    python bench/drafting.py [--quick] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

os.environ.setdefault("NUMBA_NUM_THREADS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import numpy as np
from harness import median, save, show, timed
from numpy.typing import NDArray
from texts import library_tokens

from freedraft.plugins.registry import make_drafter

COMMITTED, DRAFTED = 2, 8
Tokens = NDArray[np.int32]


class Contender(Protocol):
    """One drafter in the comparison: `rows` texts, grown and drafted for together."""

    name: str

    def start(self, texts: Sequence[Tokens], steps: int) -> None: ...
    def step(self, new: Sequence[Tokens]) -> None: ...
    def stop(self) -> None: ...


class Freedraft:
    """One of ours; every draft is as long as its budget, so that no early end flatters it."""

    def __init__(self, drafter: str) -> None:
        self.name = f"freedraft {drafter}"
        options: dict[str, Any] = {"memory": "2GiB", "max_tokens": DRAFTED}
        if drafter == "suffix_automaton":
            options |= {"min_probability": 0, "min_expected": 0}
        self.drafter = make_drafter(drafter, options)

    def start(self, texts: Sequence[Tokens], steps: int) -> None:
        offsets = np.concatenate([[0], np.cumsum([len(text) for text in texts])])
        self.slots = self.drafter.open(np.concatenate(texts), offsets)
        self.budget = np.full(len(texts), DRAFTED, np.int32)
        self.offsets = np.arange(len(texts) + 1) * COMMITTED

    def step(self, new: Sequence[Tokens]) -> None:
        self.drafter.extend(self.slots, np.concatenate(new) if len(new) > 1 else new[0], self.offsets)
        self.drafts = self.drafter.draft(self.slots, self.budget)

    def stop(self) -> None:
        self.drafter.close(self.slots)

    @property
    def memory(self) -> int:
        return int(self.drafter.automata.memory_used)  # type: ignore[attr-defined]


class VllmNgram:
    """vLLM's NgramProposer, on the arrays that its engine would pass."""

    def __init__(self, low: int, high: int) -> None:
        self.name = f"vLLM ngram {low}..{high}"
        self.bounds = (low, high)

    def start(self, texts: Sequence[Tokens], steps: int) -> None:
        from vllm.v1.spec_decode.ngram_proposer import NgramProposer

        width = max(len(text) for text in texts) + steps * COMMITTED + DRAFTED + 1
        config = SimpleNamespace(
            speculative_config=SimpleNamespace(
                prompt_lookup_min=self.bounds[0], prompt_lookup_max=self.bounds[1], num_speculative_tokens=DRAFTED
            ),
            model_config=SimpleNamespace(max_model_len=width),
            scheduler_config=SimpleNamespace(max_num_seqs=len(texts)),
            parallel_config=SimpleNamespace(tensor_parallel_size=1),
        )
        self.proposer = NgramProposer(config)
        self.tokens = np.zeros((len(texts), width), np.int32)
        self.lengths = np.array([len(text) for text in texts], np.int32)
        for row, text in enumerate(texts):
            self.tokens[row, : len(text)] = text

    def step(self, new: Sequence[Tokens]) -> None:
        # The engine has written the new tokens before it asks; so that is not counted for anyone's step below.
        self.proposer.propose(DRAFTED, self.sampled, self.lengths, self.tokens)

    def commit(self, new: Sequence[Tokens]) -> None:
        """Do the engine's part, untimed."""
        self.sampled = [tokens.tolist() for tokens in new]
        for row, tokens in enumerate(new):
            self.tokens[row, self.lengths[row] : self.lengths[row] + len(tokens)] = tokens
        self.lengths += COMMITTED

    def stop(self) -> None:
        del self.tokens


class SuffixDecoding:
    """arctic-inference's suffix cache on the own text, called a request at a time as vLLM's `suffix` calls it."""

    name = "arctic suffix decoding"
    depth = 24

    def start(self, texts: Sequence[Tokens], steps: int) -> None:
        from arctic_inference.suffix_decoding import SuffixDecodingCache

        self.cache = SuffixDecodingCache(max_tree_depth=self.depth, max_cached_requests=0)
        self.tails = [text[-self.depth :] for text in texts]
        for row, text in enumerate(texts):
            self.cache.start_request(row, text)

    def step(self, new: Sequence[Tokens]) -> None:
        for row, tokens in enumerate(new):
            self.cache.add_active_response(row, tokens)
            self.tails[row] = np.concatenate([self.tails[row], tokens])[-self.depth :]
            self.cache.speculate(row, self.tails[row], max_spec_tokens=DRAFTED, max_spec_factor=100.0)

    def stop(self) -> None:
        for row in range(len(self.tails)):
            self.cache.stop_request(row)


def contenders() -> list[Contender]:
    return [
        Freedraft("suffix_automaton"),
        Freedraft("prompt_lookup"),
        VllmNgram(2, 5),
        VllmNgram(5, 5),
        SuffixDecoding(),
    ]


def compare(rows: int, context: int, steps: int, seed: int = 0) -> list[dict[str, Any]]:
    """Time `steps` engine steps of every contender, in turns; rows of a result table."""
    text = library_tokens(3_000_000)
    span = context + 2 * steps * COMMITTED
    starts = np.random.default_rng(seed).integers(0, len(text) - span, rows)
    texts = [text[start : start + context] for start in starts]
    field = contenders()
    begun = {one.name: timed(lambda one=one: one.start(texts, 2 * steps)) for one in field}

    def take(one: Contender, step: int) -> float:
        at = context + step * COMMITTED
        new = [np.ascontiguousarray(text[start + at : start + at + COMMITTED]) for start in starts]
        if isinstance(one, VllmNgram):
            one.commit(new)
        return timed(lambda: one.step(new))

    turns: dict[str, list[float]] = {one.name: [] for one in field}
    for step in range(steps):
        for one in field:
            turns[one.name].append(take(one, step))
    alone = {one.name: [take(one, step) for step in range(steps, 2 * steps)] for one in field}
    used = next(one.memory for one in field if isinstance(one, Freedraft))
    for one in field:
        one.stop()
    ours = field[0].name
    result = []
    for one in field:
        in_turns, back_to_back = median(turns[one.name]), median(alone[one.name])
        result.append(
            {
                "rows": rows,
                "context": context,
                "drafter": one.name,
                "us a step, in turns": round(in_turns * 1e6, 2),
                "x ours": round(in_turns / median(turns[ours]), 2),
                "us a step, back to back": round(back_to_back * 1e6, 2),
                "x ours, back to back": round(back_to_back / median(alone[ours]), 2),
                "start, ms a row": round(begun[one.name] * 1e3 / rows, 2),
                "bytes a token": round(used / (rows * span), 1) if one is field[0] else "",
            }
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps and small batches, to see that it runs")
    parser.add_argument("--out", type=Path, help="folder for the result file (default: bench/results)")
    chosen = parser.parse_args()
    compare(1, 1024, 3)  # compiles every kernel, unmeasured
    results = []
    for rows, contexts in ((1, (1024, 8192, 32768, 131072)), (32, (1024, 8192, 32768)), (256, (1024, 8192, 32768))):
        if chosen.quick and rows > 32:
            continue
        for context in contexts[:2] if chosen.quick else contexts:
            steps = 20 if chosen.quick else {1: 400, 32: 60, 256: 30}[rows]
            table = compare(rows, context, steps)
            show(f"{rows} x {context}: commit {COMMITTED}, draft {DRAFTED}, one thread", table)
            results += table
    note = "medians over steps; text: the Python standard library's sources"
    print("written to", save("drafting", {"what": note, "results": results}, chosen.out))


if __name__ == "__main__":
    main()
