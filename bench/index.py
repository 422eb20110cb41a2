"""Measure the retrieval index: its build, its size, its opening, and what following and drafting cost.

Beside it, in the same run and for the same documents and queries: a plain suffix automaton in compact arrays
(freedraft's own online one), one of Python objects as SAM-Decoding keeps it, and arctic-inference's suffix tree. Each
runs in a process of its own, on one thread.

The documents are a trace of chat replies, then files of installed packages, tokenised. 64 sequences of text that is not
among them are followed, 4 tokens a step, and 8 tokens drafted for each after every step. "Cold" steps come after a walk
through 128 MiB of other memory, as after a model's forward pass on a CPU.

    python bench/index.py [--traces FOLDER] [--tokenizer FOLDER] [--sizes 1000000 20000000] [--quick] [--out FOLDER]

Predicted before the first run of following and drafting (construction and size had been tried, 1.9 to 3.6 M tokens/s
and 20 to 23 bytes a token): `freedraft index build` from text 0.5 M tokens/s a core, because the tokenizer alone does
0.8; opened in 2 ms; at 20 M tokens 0.6 us a followed token and 2 us a draft, 1.3 times the plain automaton, whose nodes
need fewer look-ups but take three times the memory; the suffix tree 10 us a draft and 200 bytes a token.
Found: a draft took 3.4 us until the kernels took their arrays one by one; bench/results/index.md has what it takes now.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

os.environ.setdefault("NUMBA_NUM_THREADS", "1")

import numpy as np
from harness import machine, median, save, show, timed
from index_peers import DRAFTED, Contender, OnlineAutomaton, PythonAutomaton, SuffixDecoding, Tokens
from index_texts import Corpus, read_corpus

from freedraft.plugins.corpus import Chains, CorpusSettings, continue_batch
from freedraft.plugins.corpus import Corpus as CorpusDrafter
from freedraft.retrieval.build.tokenize import Tokenizer
from freedraft.retrieval.index.construct import compact_suffix_automaton
from freedraft.retrieval.index.documents import Documents
from freedraft.retrieval.index.follow import AT_LENGTH, advance_batch
from freedraft.retrieval.index.store import CorpusIndex, write_segment

ROWS, COMMITTED, STEPS = 64, 4, 200
SPAN = STEPS * COMMITTED
PASSES = ("kernels", "whole calls", "cold")
HELD_OUT = len(PASSES) * ROWS * SPAN
PYTHON_TOKENS = 1_500_000
MIN_COUNTS = (1, 2)
FIRST_STEPS = 10
MIB = 1 << 20
OURS = "freedraft index"

TARGETS = {
    "construction, M tokens/s a core": (">=", 0.5),
    "bytes a token": ("<=", 32),
    "open, ms": ("<=", 50),
    "follow, us a token": ("<=", 2),
    "draft 8, us": ("<=", 3),
}


class Index:
    """An index on disk as one or more segments, through its kernels."""

    def __init__(self, folder: str) -> None:
        self.segments = CorpusIndex(folder).segments

    def reset(self, rows: int) -> None:
        self.slots = np.arange(rows)
        self.cursors = [segment.new_cursors(rows) for segment in self.segments]
        self.budget = np.full(rows, DRAFTED, np.int32)
        self.chains = [Chains.none(rows, DRAFTED) for _ in self.segments]

    def follow(self, tokens: Tokens, offsets: Any) -> None:
        for segment, cursors in zip(self.segments, self.cursors, strict=True):
            advance_batch(segment.automaton, cursors, self.slots, tokens, offsets)

    def draft(self) -> Any:
        for segment, cursors, chains in zip(self.segments, self.cursors, self.chains, strict=True):
            chains.lengths[:] = 0
            continue_batch(
                segment.automaton, cursors, self.slots, self.budget, 1, 0.0,
                chains.tokens, chains.probability, chains.lengths,
            )  # fmt: skip
        return self.chains[0].tokens

    def lengths(self) -> Any:
        """Tokens of each sequence's longest match."""
        return np.max([cursors[:, AT_LENGTH] for cursors in self.cursors], axis=0)


class IndexDrafter:
    """The same as `corpus` is called by a runtime: argument checks and assembly of the drafts included."""

    def __init__(self, folder: str) -> None:
        settings = CorpusSettings(index=folder, max_tokens=DRAFTED, min_match=1, min_probability=0, min_expected=0)
        self.drafter = CorpusDrafter(settings)

    def reset(self, rows: int) -> None:
        self.slots = self.drafter.open(np.zeros(0, np.int32), np.zeros(rows + 1, np.int64))
        self.budget = np.full(rows, DRAFTED, np.int32)

    def follow(self, tokens: Tokens, offsets: Any) -> None:
        self.drafter.extend(self.slots, tokens, offsets)

    def draft(self) -> Any:
        return self.drafter.draft(self.slots, self.budget)


def run(contender: Any, text: Tokens, cold: bool = False) -> dict[str, Any]:
    """Follow `ROWS` pieces of a text and draft; medians over steps, and the longest matches."""
    pieces = text[: ROWS * SPAN].reshape(ROWS, SPAN)
    offsets = np.arange(ROWS + 1) * COMMITTED
    other = np.zeros(128 * MIB // 8)
    contender.reset(ROWS)
    follow, draft, matches = [], [], []
    for step in range(STEPS):
        new = np.ascontiguousarray(pieces[:, step * COMMITTED : (step + 1) * COMMITTED]).reshape(-1)
        if cold:
            other += 1
        follow.append(timed(lambda new=new: contender.follow(new, offsets)))
        if cold:
            other += 1
        draft.append(timed(contender.draft))
        if hasattr(contender, "lengths"):
            matches.append(contender.lengths().copy())
    return {
        "follow": 1e6 * median(follow[FIRST_STEPS:]) / (ROWS * COMMITTED),
        "draft": 1e6 * median(draft[FIRST_STEPS:]) / ROWS,
        "matches": np.array(matches),
    }


def passes(make: Callable[[str], Any], held_out: dict[str, Tokens], which: Sequence[str]) -> dict[str, Any]:
    """`run` for each kind of text and each of `PASSES`, on text that no earlier one has brought into the caches."""
    found = {}
    for kind, text in held_out.items():
        for name in which:
            part = text[PASSES.index(name) * ROWS * SPAN :]
            found[f"{kind}, {name}"] = run(make(name), part, cold=name == "cold")
    return found


def resident() -> int:
    """Bytes of this process in memory."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    return 0


def measure_index(folder: str, held_out: dict[str, Tokens]) -> dict[str, Any]:
    """In a process of its own: open the index, follow, draft."""
    size = sum(path.stat().st_size for path in Path(folder).iterdir())
    for path in Path(folder).iterdir():
        path.read_bytes()
    opening = [timed(lambda: CorpusIndex(folder)) for _ in range(21)]
    index, drafter = Index(folder), IndexDrafter(folder)
    run(index, held_out["code"])  # compiles
    run(drafter, held_out["code"])
    made: dict[str, Any] = {"whole calls": drafter}
    return {
        "bytes": size,
        "open": median(opening),
        **passes(lambda name: made.get(name, index), held_out, PASSES),
    }


def measure_construction(text: Tokens) -> dict[str, Any]:
    """In a process of its own: nodes and edges of a text, three times."""
    compact_suffix_automaton(text[:1000].copy())
    rates = []
    for _ in range(3):
        started, cpu = perf_counter(), process_time()
        compact_suffix_automaton(text)
        rates.append((len(text) / (perf_counter() - started), len(text) / (process_time() - cpu)))
    return {"rate": median([a for a, _ in rates]), "rate a core": median([b for _, b in rates])}


def measure_peer(name: str, documents: Sequence[Tokens], held_out: dict[str, Tokens], folder: str) -> dict[str, Any]:
    """In a process of its own: build a peer from the documents, follow, draft."""
    made: dict[str, Callable[[], Contender]] = {
        "online": OnlineAutomaton, "python": PythonAutomaton, "suffix decoding": SuffixDecoding,
    }  # fmt: skip
    small = made[name]()
    small.build(documents[:2])  # compiles
    run(small, held_out["code"])
    del small
    contender = made[name]()
    gc.collect()
    gc.disable()
    before, started = resident(), process_time()
    contender.build(documents)
    built = process_time() - started
    tokens = sum(map(len, documents))
    found = {"rate a core": tokens / built, "bytes": getattr(contender, "bytes", resident() - before), "open": built}
    if isinstance(contender, PythonAutomaton):
        path = os.path.join(folder, "automaton.pickle")
        contender.save(path)
        found["file bytes"] = os.path.getsize(path)
        contender = PythonAutomaton()
        found["open"] = timed(lambda: contender.load(path))
    which = [one for one in PASSES if one != "whole calls"]
    return {**found, **passes(lambda _: contender, held_out, which)}


def apart(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Call a function in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def command(folder: Path, sources: Sequence[Path], tokenizer: str, *options: str) -> dict[str, Any]:
    """Run `freedraft index build`; its report, and of all its processes the CPU time and the most memory at a time."""
    import psutil

    arguments = [sys.executable, "-m", "freedraft.integrations.cli", "index", "build", str(folder), *map(str, sources)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = perf_counter()
    process = subprocess.Popen(
        [*arguments, "--tokenizer", tokenizer, "--replace", "--json", *options], stdout=subprocess.PIPE, text=True
    )
    peak = 0
    ended = threading.Event()

    def watch() -> None:
        nonlocal peak
        parent = psutil.Process(process.pid)
        while not ended.wait(0.02):
            try:
                family = [parent, *parent.children(recursive=True)]
                peak = max(peak, sum(one.memory_info().rss for one in family))
            except psutil.Error:
                continue

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, _ = process.communicate()
    seconds = perf_counter() - started
    ended.set()
    watcher.join()
    if process.returncode:
        raise RuntimeError(f"freedraft index build ended with status {process.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    report = json.loads(output)["added"]
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"tokens": report["tokens"], "segments": len(CorpusIndex(folder).segments), "seconds": seconds, "cpu": cpu,
            "peak": peak}  # fmt: skip


def write_sources(corpus: Corpus, folder: Path) -> dict[str, list[Path]]:
    """The documents as texts (JSON lines of replies, a folder of files) and as token ids."""
    texts, ids = folder / "texts", folder / "ids"
    texts.mkdir(parents=True)
    ids.mkdir()
    with open(folder / "replies.jsonl", "w", encoding="utf-8") as file:
        for text in corpus.texts[: corpus.chats]:
            file.write(json.dumps({"text": text}) + "\n")
    for number, text in enumerate(corpus.texts[corpus.chats :]):
        (texts / f"{number:06d}.txt").write_text(text, encoding="utf-8")
    for number, tokens in enumerate(corpus.documents):
        np.save(ids / f"{number:06d}.npy", tokens)
    return {"text": [folder / "replies.jsonl", texts], "token ids": [ids]}


def measure_builds(corpus: Corpus, folder: Path, tokenizer: str) -> tuple[Path, list[dict[str, Any]]]:
    """Build with the command, from texts and from token ids, within several memories; leaves one index."""
    sources = write_sources(corpus, folder)
    target = folder / "an.index"
    plans: list[tuple[str, str, int]] = [("text", "4GiB", 1)]
    if corpus.tokens > 5_000_000:
        plans += [("text", "1GiB", 1), ("text", "4GiB", 2), ("token ids", "1GiB", 1), ("token ids", "4GiB", 2)]
    plans += [("token ids", "4GiB", 1)]
    small = folder / "small.npy"
    np.save(small, corpus.documents[0])
    sources["one reply"] = [small]
    command(target, [small], tokenizer)  # compiles
    plans.insert(0, ("one reply", "4GiB", 1))
    rows = []
    for source, memory, workers in plans:
        found = command(target, sources[source], tokenizer, "--max-memory", memory, "--workers", str(workers))
        limit = int(memory.removesuffix("GiB")) << 10
        rows.append(
            {
                "tokens": found["tokens"],
                "from": source,
                "--max-memory, MiB": limit,
                "--workers": workers,
                "segments": found["segments"],
                "peak, MiB": found["peak"] // MIB,
                "seconds": round(found["seconds"], 1),
                "CPU seconds": round(found["cpu"], 1),
                "M tokens/s": round(found["tokens"] / found["seconds"] / 1e6, 3),
                "M tokens/s a core": round(found["tokens"] / found["cpu"] / 1e6, 3),
                "within memory": "yes" if found["peak"] // MIB <= limit else "no",
            }
        )
    return target, rows


def sizes_by_min_count(corpus: Corpus, folder: Path) -> list[dict[str, Any]]:
    """What `--min-count` saves: the size of the one segment that holds the documents."""
    documents = Documents.of((str(i), document) for i, document in enumerate(corpus.documents))
    rows = []
    for min_count in MIN_COUNTS:
        size = write_segment(folder / f"{min_count}.segment", documents, min_count).size
        row = {"tokens": corpus.tokens, "--min-count": min_count, "bytes a token": round(size / corpus.tokens, 1)}
        rows.append(row)
    return rows


def as_text(documents: Sequence[Tokens]) -> Tokens:
    """The documents with borders, as a segment has them."""
    return Documents.of((str(i), document) for i, document in enumerate(documents)).text()[0]


def table_row(name: str, tokens: int, found: dict[str, Any]) -> dict[str, Any]:
    """One contender's line."""
    row: dict[str, Any] = {
        "structure": name,
        "tokens": tokens,
        "build, M tokens/s a core": round(found["rate a core"] / 1e6, 3) if "rate a core" in found else "",
        "bytes a token": round(found["bytes"] / tokens, 1),
        "open, ms": round(1e3 * found["open"], 2),
    }
    for key, value in found.items():
        if isinstance(value, dict):
            row[f"follow, us a token, {key}"] = round(value["follow"], 3)
            row[f"draft 8, us, {key}"] = round(value["draft"], 3)
    return row


def compare(corpus: Corpus, folder: Path, tokenizer: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """All contenders for one corpus: a row each; and the rows of the builds."""
    tokens = corpus.tokens
    index, builds = measure_builds(corpus, folder, tokenizer)
    built = apart(measure_construction, as_text(corpus.documents))
    ours = {"rate a core": built["rate a core"], **apart(measure_index, str(index), corpus.held_out)}
    rows = [table_row(OURS, tokens, ours)]
    online = apart(measure_peer, "online", corpus.documents, corpus.held_out, str(folder))
    for kind in corpus.held_out:
        if not (ours[f"{kind}, kernels"]["matches"] == online[f"{kind}, kernels"]["matches"]).all():
            raise AssertionError(f"{kind}: the index and the plain automaton disagree on the longest matches")
    rows.append(table_row("plain suffix automaton, compact", tokens, online))
    if tokens < PYTHON_TOKENS:
        found = apart(measure_peer, "python", corpus.documents, corpus.held_out, str(folder))
        rows.append(table_row("plain suffix automaton, Python objects", tokens, found))
    found = apart(measure_peer, "suffix decoding", corpus.documents, corpus.held_out, str(folder))
    rows.append(table_row("arctic suffix tree, depth 24", tokens, found))
    return rows, builds


def judged(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The targets beside what was measured: the worse of the kinds of text, by the kernels."""
    values = {
        "construction, M tokens/s a core": row["build, M tokens/s a core"],
        "bytes a token": row["bytes a token"],
        "open, ms": row["open, ms"],
        "follow, us a token": max(v for k, v in row.items() if k.startswith("follow") and k.endswith("kernels")),
        "draft 8, us": max(v for k, v in row.items() if k.startswith("draft") and k.endswith("kernels")),
    }
    return [
        {
            "tokens": row["tokens"],
            "what": what,
            "target": f"{sign} {bound}",
            "measured": values[what],
            "met": "yes" if (values[what] >= bound if sign == ">=" else values[what] <= bound) else "no",
        }
        for what, (sign, bound) in TARGETS.items()
    ]


def judged_builds(builds: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same for the builds with the command."""
    rate = next(row["M tokens/s a core"] for row in builds if row["from"] == "text")
    share = max(row["peak, MiB"] / row["--max-memory, MiB"] for row in builds)
    return [
        {
            "tokens": builds[-1]["tokens"],
            "what": what,
            "target": target,
            "measured": value,
            "met": "yes" if met else "no",
        }
        for what, target, value, met in (
            ("build from text, M tokens/s a core", ">= 0.5", rate, rate >= 0.5),
            ("peak memory, share of --max-memory", "<= 1", round(share, 2), share <= 1),
        )
    ]


def markdown_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Rows of equal keys as the lines of a table."""
    lines = [f"| {' | '.join(rows[0])} |", "|" + " --- |" * len(rows[0])]
    return lines + [f"| {' | '.join(map(str, row.values()))} |" for row in rows]


def shown(rows: Sequence[dict[str, Any]], kinds: Sequence[str]) -> list[dict[str, Any]]:
    """What a reader compares: by kind of text, and a step (4 tokens followed, 8 drafted) as a multiple of ours."""

    def step(row: dict[str, Any], name: str) -> float:
        costs = [COMMITTED * row[f"follow, us a token, {k}, {name}"] + row[f"draft 8, us, {k}, {name}"] for k in kinds]
        return sum(costs) / len(costs)

    table = []
    for row in rows:
        ours = next(one for one in rows if one["tokens"] == row["tokens"])
        line = {key: row[key] for key in ("tokens", "structure")}
        line |= {key: row[key] for key in ("build, M tokens/s a core", "bytes a token", "open, ms")}
        for what in ("follow, us a token", "draft 8, us"):
            line[f"{what}: {' / '.join(kinds)}"] = " / ".join(
                f"{row[f'{what}, {kind}, kernels']:.2f}" for kind in kinds
            )
        line["a step, us"] = round(step(row, "kernels"), 2)
        line["x ours"] = round(step(row, "kernels") / step(ours, "kernels"), 2)
        line["cold"] = round(step(row, "cold"), 2)
        line["cold, x ours"] = round(step(row, "cold") / step(ours, "cold"), 2)
        table.append(line)
    return table


def write_markdown(
    path: Path,
    targets: list[dict[str, Any]],
    rows: list[dict[str, Any]],
    builds: list[dict[str, Any]],
    sizes: list[dict[str, Any]],
    kinds: list[str],
) -> None:
    """The tables, with what they mean."""
    about = machine()
    whole = [
        f"at {row['tokens']} tokens "
        + ", ".join(
            f"{row[f'follow, us a token, {kind}, whole calls']:.2f} us a followed token and "
            f"{row[f'draft 8, us, {kind}, whole calls']:.2f} us a draft ({kind})"
            for kind in kinds
        )
        for row in rows
        if row["structure"] == OURS
    ]
    text = [
        "# The retrieval index",
        "",
        *markdown_table(targets),
        "",
        "Following and drafting: the kernels alone, the slower of the kinds of text, page cache warm, medians over",
        f"{STEPS - FIRST_STEPS} steps of {ROWS} sequences that each follow {COMMITTED} tokens and draft {DRAFTED}.",
        "",
        "## Beside others",
        "",
        *markdown_table(shown(rows, kinds)),
        "",
        f"A step = {COMMITTED} tokens followed, {DRAFTED} drafted, for one of {ROWS} sequences. Cold = after a walk",
        "through 128 MiB of other memory. Open = until the first query: the index is mapped, the pickle is loaded, the",
        "others are built anew, which is their time here. Build: one thread, CPU time, token ids in memory.",
        "",
        "The compact plain automaton is freedraft's online one, 2^23 tokens at most each, so that 20 M tokens take",
        "three. The index finds exactly the same longest matches: checked in this run. It checks all that it reads and",
        "looks for the best of four contexts, which the plain one does not. The one of Python objects stands for",
        "SAM-Decoding, whose StaticSAM keeps a dictionary a state and the text, pickled, and drafts what followed the",
        "first occurrence; it is left out where memory would not do. The suffix tree matches the last 24 tokens anew",
        "for each draft, so that its `follow` only keeps them.",
        "",
        "Called as a runtime calls the drafter, with checks of arguments and the assembly of drafts: "
        + "; ".join(whole)
        + ".",
        "",
        "## Builds with the command",
        "",
        *markdown_table(builds),
        "",
        "From start to end, Python's start and the tokenizer included. Peak: resident memory of all its processes,",
        "looked at every 20 ms. A core: by the CPU time of all processes. What one reply takes is the start,",
        "which is more than half of a build of 1 M tokens. Seconds suffer from what else runs on the machine, CPU",
        "seconds less.",
        "",
        "## --min-count",
        "",
        *markdown_table(sizes),
        "",
        "The same documents in one segment, named by their numbers. One build each: same text, same bytes.",
        "",
        f"{about['processor']}, {about['cores']} cores, Python {about['python']}; "
        + ", ".join(f"{name} {number}" for name, number in about["packages"].items())
        + ". Made by `bench/index.py`.",
    ]
    path.write_text("\n".join(text) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).resolve().parent.parent
    parser.add_argument("--traces", type=Path, default=here.parent / "shared" / "traces", help="if it is there")
    parser.add_argument("--tokenizer", default=str(here / ".cache" / "SmolLM2-135M-Instruct"))
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000_000, 20_000_000], help="tokens")
    parser.add_argument("--quick", action="store_true", help="100000 tokens, to see that it runs")
    parser.add_argument("--out", type=Path, help="folder for the result files (default: bench/results)")
    chosen = parser.parse_args()
    sizes = [100_000] if chosen.quick else chosen.sizes
    traces = chosen.traces if chosen.traces.is_dir() else None
    largest = read_corpus(max(sizes), traces, Tokenizer(chosen.tokenizer), HELD_OUT)
    rows, builds, targets, by_min_count = [], [], [], []
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            found, built = compare(largest.first(size), Path(folder), chosen.tokenizer)
            by_min_count += sizes_by_min_count(largest.first(size), Path(folder))
        for row in found:
            show(row["structure"], [{"what": key, "value": value} for key, value in row.items()])
        show("builds", built)
        rows += found
        builds += built
        targets += [*judged(found[0]), *judged_builds(built)]
    show("targets", targets)
    show("--min-count", by_min_count)
    content = {"targets": targets, "structures": rows, "builds": builds, "min_count": by_min_count}
    written = save("index", content, chosen.out)
    write_markdown(written.with_suffix(".md"), targets, rows, builds, by_min_count, list(largest.held_out))
    print("written to", written)


if __name__ == "__main__":
    main()
