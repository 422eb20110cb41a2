"""Replay recorded replies: fusion with pacing beside vLLM's n-gram and suffix decoding, at every cost of a token.

Fusion runs with one configuration, told only the cost curve. Each peer runs with the draft length that is best for it
in that cell, and 0 = no drafts is one of its choices. Sources are equal within a block: the own text alone; with
earlier replies of the set; with these and a corpus of others' replies.

    python bench/replay.py TRACES [--tokens 8000] [--sets chat ...] [--corpus FILE] [--out FOLDER]

TRACES is a folder of `.npz` files as `freedraft replay` reads them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import numpy as np
from harness import RESULTS, machine, show
from numpy.typing import NDArray

from freedraft.integrations.replay.costs import CPU, Cost, linear
from freedraft.integrations.replay.recorded import Request, read_requests
from freedraft.integrations.replay.runs import first_requests
from freedraft.integrations.replay.simulate import replay, told_pacer
from freedraft.plugins.fusion import Fusion, FusionSettings
from freedraft.plugins.pacing import Pacer, PacingSettings

COSTS = [*(linear(c) for c in (0, 0.01, 0.02, 0.05, 0.1, 0.2)), CPU]
LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24)
SOURCES = ("own text", "earlier replies", "corpus")
CORPUS_TOKENS = 500_000
Tokens = NDArray[np.int32]

# A draft verified: its length -> how many steps had it.
Steps = Counter[int]


class Ngram:
    """vLLM's NgramProposer with one row."""

    def __init__(self, low: int, high: int, longest: int) -> None:
        from vllm.v1.spec_decode.ngram_proposer import NgramProposer

        self.width = 2**17
        self.longest = longest
        self.proposer = NgramProposer(
            SimpleNamespace(
                speculative_config=SimpleNamespace(
                    prompt_lookup_min=low, prompt_lookup_max=high, num_speculative_tokens=longest
                ),
                model_config=SimpleNamespace(max_model_len=self.width),
                scheduler_config=SimpleNamespace(max_num_seqs=1),
                parallel_config=SimpleNamespace(tensor_parallel_size=1),
            )
        )
        self.tokens = np.zeros((1, self.width), np.int32)

    def start(self, prompt: Tokens) -> None:
        self.length = len(prompt)
        self.tokens[0, : self.length] = prompt

    def draft(self) -> list[int]:
        lengths = np.array([self.length], np.int32)
        return list(self.proposer.propose(self.longest, [[0]], lengths, self.tokens)[0])

    def commit(self, tokens: Tokens) -> None:
        self.tokens[0, self.length : self.length + len(tokens)] = tokens
        self.length += len(tokens)

    def stop(self) -> None:
        pass


class SuffixDecoding:
    """arctic-inference's suffix cache with the options that vLLM's `suffix` has by default."""

    depth = 24

    def __init__(self, longest: int, replies: bool, corpus: Sequence[Tokens] = ()) -> None:
        from arctic_inference.suffix_decoding import SuffixDecodingCache

        self.cache = SuffixDecodingCache(max_tree_depth=self.depth, max_cached_requests=10**6 if replies else 0)
        self.longest = longest
        self.request = 0
        for text in corpus:
            self.start(text[:0])
            self.commit(text)
            self.stop()

    def start(self, prompt: Tokens) -> None:
        self.request += 1
        self.tail = prompt[-self.depth :]
        self.cache.start_request(self.request, prompt)

    def draft(self) -> list[int]:
        drafted = self.cache.speculate(
            self.request, self.tail, max_spec_tokens=self.longest, max_spec_factor=1.0, min_token_prob=0.1
        )
        return list(drafted.token_ids)

    def commit(self, tokens: Tokens) -> None:
        self.cache.add_active_response(self.request, tokens)
        self.tail = np.concatenate([self.tail, tokens])[-self.depth :]

    def stop(self) -> None:
        self.cache.stop_request(self.request)


def run_peer(peer: Any, requests: Sequence[Request]) -> tuple[int, Steps]:
    """Reply tokens, and the lengths of the drafts verified; as in `simulate.replay`."""
    steps: Steps = Counter()
    tokens = 0
    for request in requests:
        peer.start(request.prompt)
        reply, place = request.reply, 0
        while place < len(reply):
            drafted = peer.draft()[: len(reply) - place - 1]
            accepted = 0
            while accepted < len(drafted) and drafted[accepted] == reply[place + accepted]:
                accepted += 1
            steps[len(drafted)] += 1
            peer.commit(reply[place : place + accepted + 1])
            place += accepted + 1
        tokens += len(reply)
        peer.stop()
    return tokens, steps


def speedup(tokens: int, steps: Steps, cost: Cost) -> float:
    """Plain time over time."""
    return tokens * cost(1) / sum(count * cost(1 + length) for length, count in steps.items())


def peers(source: str, corpus: Sequence[Tokens]) -> dict[str, Callable[[int], Any]]:
    """Name -> one that drafts up to so many tokens, with no more than these sources."""
    if source == "own text":
        return {
            "vLLM ngram 2..5": lambda k: Ngram(2, 5, k),
            "vLLM ngram 1..4": lambda k: Ngram(1, 4, k),
            "suffix decoding": lambda k: SuffixDecoding(k, False),
        }
    if source == "earlier replies":
        return {"suffix decoding": lambda k: SuffixDecoding(k, True)}
    return {"suffix decoding": lambda k: SuffixDecoding(k, True, corpus)}


def fusion(source: str, corpus: Sequence[Tokens]) -> Fusion:
    """Fusion as it is by default; the corpus stands where its older generation of replies would."""
    made = Fusion(FusionSettings(scope="off" if source == "own text" else "engine"))
    for text in corpus if source == "corpus" else ():
        slots = made.automata.open(text, np.array([0, len(text)]))
        made.responses.add(slots, np.zeros(1, np.int64))
        made.automata.close(slots)
    if source == "corpus" and not made.responses.rotate():
        raise ValueError(f"the corpus has fewer tokens than a generation of replies: {CORPUS_TOKENS}")
    return made


def compare(name: str, requests: Sequence[Request], source: str, corpus: Sequence[Tokens]) -> list[dict[str, Any]]:
    """A row a cost: ours, each peer at its best, and the ratio to the best of them."""
    measured = {peer: {k: run_peer(make(k), requests) for k in LENGTHS} for peer, make in peers(source, corpus).items()}
    rows = []
    for cost in COSTS:
        outcome = replay(
            fusion(source, corpus), requests, cost, pacer=told_pacer(Pacer(PacingSettings(margin=0)), cost)
        )
        row: dict[str, Any] = {"set": name, "sources": source, "cost": cost.name, "fusion": round(outcome.speedup, 3)}
        best = 1.0
        for peer in ("vLLM ngram 2..5", "vLLM ngram 1..4", "suffix decoding"):
            if peer not in measured:
                row |= {peer: "", f"{peer} k": ""}
                continue
            rates = {k: speedup(*steps, cost) for k, steps in measured[peer].items()}
            k = max(rates, key=rates.__getitem__)
            row |= {peer: round(max(rates[k], 1.0), 3), f"{peer} k": k if rates[k] > 1 else 0}
            best = max(best, rates[k])
        row |= {
            "ratio": round(outcome.speedup / best, 3),
            "tokens a step": round(outcome.tokens_per_step, 3),
            "calibration": outcome.as_dict()["calibration"],
        }
        rows.append(row)
    return rows


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def as_markdown(rows: Sequence[dict[str, Any]], tokens: int) -> str:
    """The tables, one for each choice of sources."""
    lines = [
        "# Replay",
        "",
        f"Speed-up over plain decoding on the first {tokens} reply tokens of each set, by replay: one sequence at a",
        "time, T(n) told. Fusion with pacing has one configuration for all cells; each peer has its best draft length",
        "(after the slash; 0 = drafts nothing) for every cell. Ratio = fusion to the best peer. Made by",
        "`bench/replay.py`.",
    ]
    for source in dict.fromkeys(row["sources"] for row in rows):
        chosen = [row for row in rows if row["sources"] == source]
        names = [peer for peer in ("vLLM ngram 2..5", "vLLM ngram 1..4", "suffix decoding") if chosen[0][peer]]
        lines += ["", f"## {source}", "", f"| set | cost | fusion | {' | '.join(names)} | ratio |"]
        lines += ["|---|---|---|" + "---|" * (len(names) + 1)]
        for row in chosen:
            cells = " | ".join(f"{row[name]:.3f} / {row[f'{name} k']}" for name in names)
            lines.append(f"| {row['set']} | {row['cost']} | {row['fusion']:.3f} | {cells} | {row['ratio']:.3f} |")
        ratios = [row["ratio"] for row in chosen]
        won = sum(ratio > 1 for ratio in ratios)
        lines += [
            "",
            f"Geometric mean of the ratios: {geometric_mean(ratios):.3f}; above the best peer in {won} of",
            f"{len(ratios)} cells; lowest ratio {min(ratios):.3f}.",
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path)
    parser.add_argument("--tokens", type=int, default=8000, help="reply tokens of each set")
    parser.add_argument("--sets", nargs="*", help="names of sets (default: all but the corpus)")
    parser.add_argument("--corpus", default="corpus_chat", help="the set that is the corpus")
    parser.add_argument("--sources", nargs="*", default=SOURCES, choices=SOURCES)
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    names = chosen.sets or sorted(path.stem for path in chosen.traces.glob("*.npz") if path.stem != chosen.corpus)
    corpus: list[Tokens] = []
    if "corpus" in chosen.sources:
        texts = [request.reply for request in read_requests(chosen.traces / f"{chosen.corpus}.npz")]
        total = 0
        for text in texts:
            if total < CORPUS_TOKENS:
                corpus.append(text)
                total += len(text)
    rows: list[dict[str, Any]] = []
    for name in names:
        requests = first_requests(read_requests(chosen.traces / f"{name}.npz"), chosen.tokens)
        for source in chosen.sources:
            made = compare(name, requests, source, corpus)
            show(
                f"{name}, {source}", [{k: row[k] for k in ("cost", "fusion", "ratio", "tokens a step")} for row in made]
            )
            rows += made
    rows.sort(key=lambda row: SOURCES.index(row["sources"]))
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "replay.md").write_text(as_markdown(rows, chosen.tokens), encoding="utf-8")
    content = {"machine": machine(), "tokens": chosen.tokens, "results": rows}
    (chosen.out / "replay.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print("all cells:", round(geometric_mean([row["ratio"] for row in rows]), 4))


if __name__ == "__main__":
    main()
