"""Replay recorded replies: what an index of other conversations adds to drafting, in tokens a step.

The index is built from the trace of the corpus with `build_index`, into a temporary folder. Replies that are replayed
are not in it: documents that equal one are left out, and the table says how much of the replies is in the corpus in
long pieces all the same.

`suffix_automaton` drafts from the own text, `corpus` from the index; "both" takes for each sequence the draft that
expects more accepted tokens. `fusion` weighs all evidence itself. Each drafter verifies all that it drafts, with its
default settings and once without thresholds, as where verifying costs nothing.

    python bench/corpus_gain.py [--traces FOLDER] [--tokenizer FOLDER] [--tokens 20000] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("NUMBA_NUM_THREADS", "1")

import numpy as np
from harness import machine, save, show
from numpy.typing import NDArray

from freedraft.integrations.replay.costs import linear
from freedraft.integrations.replay.recorded import Request, read_requests
from freedraft.integrations.replay.runs import first_requests
from freedraft.integrations.replay.simulate import replay
from freedraft.plugins.base import Drafter, Drafts, Feedback, FeedbackKind
from freedraft.plugins.registry import make_drafter
from freedraft.retrieval.build.builder import build_index
from freedraft.retrieval.build.tokenize import Tokenizer
from freedraft.retrieval.index.store import CorpusIndex
from freedraft.retrieval.ragged import Int32, Int64

SETS = ("chat", "instruct")
LONG_MATCH = 32
EAGER: dict[str, Any] = {"min_probability": 0, "min_expected": 0}
Tokens = NDArray[np.int32]


class Both:
    """Two drafters; of their drafts, for each sequence, the one that expects more accepted tokens."""

    feedback: frozenset[FeedbackKind] = frozenset()

    def __init__(self, first: Drafter, second: Drafter) -> None:
        self.drafters = (first, second)
        self.slots: dict[int, tuple[int, int]] = {}

    def open(self, prompts: Int32, offsets: Int64) -> Int64:
        opened = [drafter.open(prompts, offsets) for drafter in self.drafters]
        self.slots |= {int(a): (int(a), int(b)) for a, b in zip(*opened, strict=True)}
        return opened[0]

    def extend(self, slots: Int64, tokens: Int32, offsets: Int64) -> None:
        for i, drafter in enumerate(self.drafters):
            drafter.extend(self._of(slots, i), tokens, offsets)

    def draft(self, slots: Int64, budget: Int32) -> Drafts:
        first, second = (drafter.draft(self._of(slots, i), budget) for i, drafter in enumerate(self.drafters))
        chosen = []
        for row in range(len(slots)):
            one, other = first.row(row), second.row(row)
            better = second.probability[other].sum() > first.probability[one].sum()
            chosen.append((second, other) if better else (first, one))
        parts = {
            name: np.concatenate([getattr(drafts, name)[row] for drafts, row in chosen])
            for name in ("tokens", "parents", "probability", "source")
        }
        offsets = np.zeros(len(slots) + 1, np.int64)
        np.cumsum([row.stop - row.start for _, row in chosen], out=offsets[1:])
        return Drafts(**parts, offsets=offsets)

    def observe(self, slots: Int64, feedback: Feedback) -> None:
        """Neither learns from it."""

    def close(self, slots: Int64) -> None:
        for i, drafter in enumerate(self.drafters):
            drafter.close(self._of(slots, i))
        for slot in slots.tolist():
            del self.slots[slot]

    def _of(self, slots: Int64, i: int) -> Int64:
        return np.array([self.slots[slot][i] for slot in slots.tolist()], np.int64)


def other_replies(corpus: Sequence[Request], requests: Sequence[Request]) -> list[Tokens]:
    """The corpus's replies that are not replayed."""
    replayed = {request.reply.tobytes() for request in requests}
    return [request.reply for request in corpus if request.reply.tobytes() not in replayed]


def build(texts: Sequence[Tokens], tokenizer: Tokenizer, folder: Path) -> dict[str, int]:
    """Build the index `folder / "an.index"` of texts; what it came to."""
    sources = folder / "ids"
    sources.mkdir()
    for number, tokens in enumerate(texts):
        np.save(sources / f"{number:06d}.npy", tokens)
    report = build_index(folder / "an.index", [sources], tokenizer)
    return {"documents": report.documents, "tokens": report.tokens}


def in_long_pieces(index: CorpusIndex, requests: Sequence[Request]) -> float:
    """The share of reply tokens that end a piece of at least `LONG_MATCH` tokens which is in the index too."""
    inside = total = 0
    for segment in index.segments:
        for request in requests:
            cursors = segment.new_cursors(1)
            for i in range(len(request.reply)):
                segment.advance(cursors, np.zeros(1, np.int64), request.reply[i : i + 1], np.array([0, 1]))
                inside += int(segment.contexts(cursors, np.zeros(1, np.int64), 1).length[0, 0] >= LONG_MATCH)
            total += len(request.reply)
    return inside / total


def drafters(index: str, options: dict[str, Any]) -> dict[str, Drafter]:
    """Name -> a new drafter. `options` are those of the chains."""

    def own() -> Drafter:
        return make_drafter("suffix_automaton", options)

    def corpus() -> Drafter:
        return make_drafter("corpus", {"index": index, **options})

    made = {"suffix_automaton": own(), "corpus": corpus(), "both": Both(own(), corpus())}
    if not options:
        for name, scope in (("fusion, own text", "off"), ("fusion, earlier replies", "engine")):
            made[name] = make_drafter("fusion", {"scope": scope})
            made[f"{name}, index"] = make_drafter("fusion", {"scope": scope, "index": index})
    return made


BASES = {
    "corpus": "suffix_automaton",
    "both": "suffix_automaton",
    "fusion, own text, index": "fusion, own text",
    "fusion, earlier replies, index": "fusion, earlier replies",
}


def compare(name: str, requests: Sequence[Request], index: str) -> list[dict[str, Any]]:
    """A row a drafter."""
    rows = []
    for thresholds, options in (("default", {}), ("none", EAGER)):
        steps: dict[str, float] = {}
        for drafter, made in drafters(index, options).items():
            outcome = replay(made, requests, linear(0))
            steps[drafter] = outcome.tokens_per_step
            judged, right, predicted = outcome.calibration.sum(axis=0).tolist()
            base = steps.get(BASES.get(drafter, ""))
            rows.append(
                {
                    "set": name,
                    "thresholds": thresholds,
                    "drafter": drafter,
                    "tokens a step": round(outcome.tokens_per_step, 3),
                    "without the index": round(base, 3) if base else "",
                    "ratio": round(outcome.tokens_per_step / base, 3) if base else "",
                    "drafted a step": round(outcome.drafted_per_step, 2),
                    "accepted": round(outcome.acceptance, 3),
                    "next right": round(right / max(1, judged), 3),
                    "predicted": round(predicted / max(1, judged), 3),
                }
            )
    return rows


def write_markdown(path: Path, rows: list[dict[str, Any]], about: dict[str, Any]) -> None:
    """The table, with what it means."""
    here = machine()
    built = about["index"]
    lines = [
        "# What an index of other conversations adds",
        "",
        f"Replay of the first {about['tokens']} reply tokens of each set, one sequence at a time. The index has",
        f"{built['documents']} replies of other conversations, {built['tokens']} tokens; {built['left out']} documents",
        "were left out because they equal a reply that is replayed. Of the replies' tokens, "
        + " and ".join(f"{100 * share:.1f} % ({name})" for name, share in about["in long pieces"].items()),
        f"end a piece of {LONG_MATCH} or more tokens that is in the index too.",
        "",
        "`both` takes the draft that expects more accepted tokens. Nothing is paced: all that is drafted is verified.",
        "Next right = of the draft tokens before which all were right, the share that was right too; predicted = what",
        "the drafter's probabilities said of it.",
        "",
        f"| {' | '.join(rows[0])} |",
        "|" + " --- |" * len(rows[0]),
        *(f"| {' | '.join(map(str, row.values()))} |" for row in rows),
        "",
        f"{here['processor']}, Python {here['python']}; freedraft {here['packages']['freedraft']}, numba "
        f"{here['packages']['numba']}. Made by `bench/corpus_gain.py`.",
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).resolve().parent.parent
    parser.add_argument("--traces", type=Path, default=here.parent / "shared" / "traces")
    parser.add_argument("--corpus", default="corpus_chat", help="the set that the index is built of")
    parser.add_argument("--tokenizer", default=str(here / ".cache" / "SmolLM2-135M-Instruct"))
    parser.add_argument("--tokens", type=int, default=20_000, help="reply tokens of each set")
    parser.add_argument("--out", type=Path, help="folder for the result files (default: bench/results)")
    chosen = parser.parse_args()
    sets = {name: first_requests(read_requests(chosen.traces / f"{name}.npz"), chosen.tokens) for name in SETS}
    replayed = [request for requests in sets.values() for request in requests]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        corpus = read_requests(chosen.traces / f"{chosen.corpus}.npz")
        texts = other_replies(corpus, replayed)
        built = build(texts, Tokenizer(chosen.tokenizer), Path(folder)) | {"left out": len(corpus) - len(texts)}
        path = os.path.join(folder, "an.index")
        index = CorpusIndex(path)
        shares = {name: round(in_long_pieces(index, requests), 4) for name, requests in sets.items()}
        for name, requests in sets.items():
            made = compare(name, requests, path)
            show(name, made)
            rows += made
    about = {"tokens": chosen.tokens, "index": built, "in long pieces": shares}
    written = save("corpus_gain", {**about, "results": rows}, chosen.out)
    write_markdown(written.with_suffix(".md"), rows, about)
    print("written to", written)


if __name__ == "__main__":
    main()
