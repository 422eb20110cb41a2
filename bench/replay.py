"""Replay recorded replies: fusion with pacing beside vLLM's n-gram and suffix decoding, at every cost of a token.

Fusion and its pacing have their default settings, and are told only the cost curve. Each peer runs with the draft
length that is best for it in that cell, and 0 = no drafts is one of its choices. Fusion drafts from the own text alone;
with earlier replies of the set; with these and a corpus of others' replies. It is compared with the best of all peers
that have no other sources, though they may have fewer. The corpus is an index on disk for fusion; suffix decoding
caches the same texts.

    python bench/replay.py TRACES [--tokens 8000] [--sets chat ...] [--corpus NAME] [--tokenizer FOLDER] [--out FOLDER]

TRACES is a folder of `.npz` files as `freedraft replay` reads them.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import numpy as np
from corpus_gain import build, other_replies
from harness import RESULTS, save, show
from numpy.typing import NDArray

from freedraft.integrations.hf.smollm2 import NAME, cache_folder
from freedraft.integrations.replay.costs import CPU, Cost, linear
from freedraft.integrations.replay.recorded import Request, read_requests
from freedraft.integrations.replay.runs import first_requests
from freedraft.integrations.replay.simulate import replay, told_pacer
from freedraft.plugins.fusion import Fusion, FusionSettings
from freedraft.plugins.pacing import Pacer
from freedraft.retrieval.build.tokenize import Tokenizer

COSTS = [*(linear(c) for c in (0, 0.01, 0.02, 0.05, 0.1, 0.2)), CPU]
LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)
SOURCES = ("own text", "earlier replies", "corpus")
CORPUS_TOKENS = 500_000
MANY = 500
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


# A peer at work: what it drafts from, of `SOURCES`, and by draft length what came of it.
Measured = dict[str, tuple[str, dict[int, tuple[int, Steps]]]]


def measure_peers(requests: Sequence[Request], corpus: Sequence[Tokens], most: str) -> Measured:
    """Run every peer that needs no other sources than `most` has, with every draft length."""
    peers: dict[str, tuple[str, Callable[[int], Any]]] = {
        "n-gram 2..5": ("own text", lambda k: Ngram(2, 5, k)),
        "n-gram 1..4": ("own text", lambda k: Ngram(1, 4, k)),
        "suffix": ("own text", lambda k: SuffixDecoding(k, False)),
        "suffix, replies": ("earlier replies", lambda k: SuffixDecoding(k, True)),
        "suffix, replies, corpus": ("corpus", lambda k: SuffixDecoding(k, True, corpus)),
    }
    return {
        name: (source, {k: run_peer(make(k), requests) for k in LENGTHS})
        for name, (source, make) in peers.items()
        if has(most, source)
    }


def has(more: str, source: str) -> bool:
    """Whether one of `SOURCES` has all that another has."""
    return SOURCES.index(more) >= SOURCES.index(source)


def fusion(source: str, index: str, tokenizer: str) -> Fusion:
    """Fusion as it is by default, but for its sources."""
    scope: Any = "off" if source == "own text" else "engine"
    if source != "corpus":
        return Fusion(FusionSettings(scope=scope))
    return Fusion(FusionSettings(scope=scope, index=index, tokenizer=tokenizer))


def compare(
    name: str, requests: Sequence[Request], source: str, measured: Measured, make: Callable[[str], Fusion]
) -> list[dict[str, Any]]:
    """A row a cost: ours, each peer at its best, and the ratio to the best of them.

    Args:
        measured: all peers; those that have other sources are left out.
        make: fusion with these sources.
    """
    rows = []
    for cost in COSTS:
        outcome = replay(make(source), requests, cost, pacer=told_pacer(Pacer(), cost))
        peers = {
            peer: best_length(results, cost) for peer, (needed, results) in measured.items() if has(source, needed)
        }
        best = max(peers, key=lambda peer: peers[peer]["speed-up"])
        rows.append(
            {
                "set": name,
                "sources": source,
                "cost": cost.name,
                "fusion": round(outcome.speedup, 3),
                "ratio": round(outcome.speedup / peers[best]["speed-up"], 3),
                "best peer": best,
                "peers": {peer: {**found, "speed-up": round(found["speed-up"], 3)} for peer, found in peers.items()},
                "tokens a step": round(outcome.tokens_per_step, 3),
                "calibration": outcome.as_dict()["calibration"],
            }
        )
    return rows


def best_length(results: dict[int, tuple[int, Steps]], cost: Cost) -> dict[str, Any]:
    """The draft length that is best for a peer, and its speed-up; length 0 where no draft pays."""
    rates = {0: 1.0} | {k: speedup(*steps, cost) for k, steps in results.items()}
    k = max(rates, key=rates.__getitem__)
    return {"speed-up": rates[k], "length": k}


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """What the ratios of some cells come to."""
    ratios = [row["ratio"] for row in rows]
    return (
        f"{geometric_mean(ratios):.3f} times the best peer in the geometric mean, above it in "
        f"{sum(ratio > 1 for ratio in ratios)} of {len(ratios)} cells, lowest ratio {min(ratios):.3f}"
    )


def calibration(rows: Sequence[dict[str, Any]]) -> str:
    """How far predicted and observed shares of right tokens lie apart."""
    buckets = [(row, bucket) for row in rows for bucket in row["calibration"]]
    many = [(row, bucket) for row, bucket in buckets if bucket["tokens"] >= MANY]
    text = (
        "Calibration was looked at too, in every cell by tenths of the probability that a token is right if all before "
        f"it were: {len(buckets)} buckets, of which {len(many)} have {MANY} tokens or more."
    )
    if not many:
        return text
    errors = np.array([abs(bucket["predicted"] - bucket["observed"]) for _, bucket in many])
    row, worst = many[int(errors.argmax())]
    return (
        f"{text} In these, the predicted and the observed share of right tokens differ by {np.median(errors):.3f} in "
        f"the median, by more than 0.02 in {int((errors > 0.02).sum())}, by more than 0.05 in "
        f"{int((errors > 0.05).sum())}. The worst is in {row['set']}, {row['sources']}, {row['cost']}: predicted "
        f"{worst['predicted']:.3f}, observed {worst['observed']:.3f} of {worst['tokens']} tokens. Cells that differ "
        "only in the cost have much the same drafts, so the buckets are not independent."
    )


def as_markdown(rows: Sequence[dict[str, Any]], tokens: int, corpus: str) -> str:
    """The tables, one for each choice of sources."""
    paragraphs = [
        "# Replay",
        f"Speed-up over plain decoding on the first {tokens} reply tokens of each set, by replay: one sequence at a "
        "time, T(n) told. Fusion and pacing have their default settings, the same in all cells. Each peer has the "
        f"draft length that is best for it in that very cell, of {', '.join(map(str, LENGTHS))} (after the slash; 0 = "
        "drafts nothing); suffix decoding's other options are vLLM's defaults.",
        "Ratio = fusion to the best peer, which is in bold: the best of all peers whose sources are no more than "
        "fusion's in that block. vLLM's n-gram drafting and suffix decoding from the own text alone compete in every "
        "block, suffix decoding from earlier replies, too, in the last two, and from the corpus, too, in the last. "
        "Made by `bench/replay.py`.",
        *([corpus] if corpus else []),
        f"Over all cells fusion is {summary(rows)}.",
        calibration(rows),
    ]
    for source in dict.fromkeys(row["sources"] for row in rows):
        chosen = [row for row in rows if row["sources"] == source]
        paragraphs += [f"## {source}", table(chosen), f"Here fusion is {summary(chosen)}."]
    return "\n\n".join(text if text[0] == "|" else textwrap.fill(text, 118) for text in paragraphs) + "\n"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Cells that have the same sources."""
    names = list(rows[0]["peers"])
    lines = [f"| set | cost | fusion | {' | '.join(names)} | ratio |", "|---|---|---|" + "---|" * (len(names) + 1)]
    for row in rows:
        cells = {name: f"{found['speed-up']:.3f} / {found['length']}" for name, found in row["peers"].items()}
        cells[row["best peer"]] = f"**{cells[row['best peer']]}**"
        peers = " | ".join(cells.values())
        lines.append(f"| {row['set']} | {row['cost']} | {row['fusion']:.3f} | {peers} | {row['ratio']:.3f} |")
    return "\n".join(lines)


def first_texts(texts: Sequence[Tokens], limit: int) -> list[Tokens]:
    """The first texts that have about `limit` tokens together."""
    before = np.cumsum([0, *map(len, texts)])[:-1]
    return [text for text, start in zip(texts, before, strict=True) if start < limit]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path)
    parser.add_argument("--tokens", type=int, default=8000, help="reply tokens of each set")
    parser.add_argument("--sets", nargs="*", help="names of sets (default: all but the corpus)")
    parser.add_argument("--corpus", default="corpus_chat", help="the set that is the corpus")
    parser.add_argument("--tokenizer", default=str(cache_folder() / NAME), help="the model's, for the index")
    parser.add_argument("--sources", nargs="*", default=SOURCES, choices=SOURCES)
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    names = chosen.sets or sorted(path.stem for path in chosen.traces.glob("*.npz") if path.stem != chosen.corpus)
    sets = {name: first_requests(read_requests(chosen.traces / f"{name}.npz"), chosen.tokens) for name in names}
    most = max(chosen.sources, key=SOURCES.index)
    corpus: list[Tokens] = []
    note = ""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        if most == "corpus":
            replayed = [request for requests in sets.values() for request in requests]
            others = other_replies(read_requests(chosen.traces / f"{chosen.corpus}.npz"), replayed)
            corpus = first_texts(others, CORPUS_TOKENS)
            built = build(corpus, Tokenizer(chosen.tokenizer), Path(folder))
            note = (
                f"The corpus: {built['documents']} replies of other conversations, {built['tokens']} tokens, none of "
                "them equal to a reply that is replayed. Fusion has it as an index on disk, made by the project's own "
                "builder and named by its setting `index`; suffix decoding has the same texts in its cache, as if they "
                "were earlier replies."
            )
        make = partial(fusion, index=str(Path(folder) / "an.index"), tokenizer=chosen.tokenizer)
        for name, requests in sets.items():
            measured = measure_peers(requests, corpus, most)
            for source in chosen.sources:
                made = compare(name, requests, source, measured, make)
                shown = ("cost", "fusion", "ratio", "best peer", "tokens a step")
                show(f"{name}, {source}", [{key: row[key] for key in shown} for row in made])
                rows += made
    rows.sort(key=lambda row: SOURCES.index(row["sources"]))
    content = {"tokens": chosen.tokens, "lengths": LENGTHS, "corpus": note, "results": rows}
    written = save("replay", content, chosen.out)
    written.with_suffix(".md").write_text(as_markdown(rows, chosen.tokens, note), encoding="utf-8")
    print("all cells:", summary(rows))


if __name__ == "__main__":
    main()
