"""Decode with real vLLM and the demo model, plain and with each speculative method, and compare the speed by task.

Each method has an engine in a process of its own, warmed up with some replies. Then they take turns, round by round:
each answers the same prompts in the same order, first one at a time, then another set with 8 at once. Every round has
fresh prompts, so that no method sees a question twice. Replies are compared with plain's.

    python bench/vllm_live.py [--rounds N] [--only METHOD ...] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

from harness import RESULTS, markdown, median, save, show
from tasks import tasks
from vllm_runs import prompt

STREAMS = 8
WARM = 3
DRAFTED = 12
AT_ONCE = 2  # engines that start at the same time
KV_CACHE = 2**29  # bytes: more than the streams need, and with all engines together less than the machine has
OURS = {"method": "custom_class", "model": "freedraft.integrations.vllm.Proposer", "num_speculative_tokens": DRAFTED}
METHODS: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    "plain": (None, {}),
    # What vLLM itself spends on having a proposer, whatever it drafts.
    "freedraft without a draft": (OURS, {"drafter": "suffix_automaton", "min_expected": 1e6}),
    "vLLM ngram 2..5": (
        {"method": "ngram", "num_speculative_tokens": DRAFTED, "prompt_lookup_min": 2, "prompt_lookup_max": 5},
        {},
    ),
    "vLLM ngram 1..4": (
        {"method": "ngram", "num_speculative_tokens": DRAFTED, "prompt_lookup_min": 1, "prompt_lookup_max": 4},
        {},
    ),
    "vLLM suffix": ({"method": "suffix", "num_speculative_tokens": DRAFTED}, {}),
    "freedraft fusion": (OURS, {"drafter": "fusion"}),
}


def worker(method: str, options: dict[str, Any], pipe: Connection) -> None:
    """Answer prompts that come down the pipe until it says None; sends replies and measurements."""
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from vllm import LLM, SamplingParams

    from freedraft.integrations.hf.smollm2 import demo_model_path

    speculative, additional = METHODS[method]
    llm = LLM(
        model=str(demo_model_path()),
        dtype="float32",
        enforce_eager=True,
        max_num_seqs=STREAMS,
        max_model_len=options["width"],
        enable_prefix_caching=False,
        kv_cache_memory_bytes=KV_CACHE,
        disable_log_stats=False,
        speculative_config=speculative,
        additional_config={"freedraft": additional} if additional else {},
    )
    greedy = SamplingParams(temperature=0, max_tokens=options["tokens"])
    llm.generate(options["warm_up"], greedy, use_tqdm=False)
    for text in options["warm_up"][::WARM]:
        llm.generate(text, greedy, use_tqdm=False)
    pipe.send("ready")
    while (job := pipe.recv()) is not None:
        prompts, streams = job
        before = _totals(llm)
        started = perf_counter()
        outputs = []
        for i in range(0, len(prompts), 1 if streams == 1 else len(prompts)):
            # With several streams all prompts are queued and vLLM keeps as many running as `max_num_seqs` says.
            outputs += llm.generate(prompts[i : i + 1] if streams == 1 else prompts, greedy, use_tqdm=False)
        seconds = perf_counter() - started
        tokens, accepted = (now - then for now, then in zip(_totals(llm), before, strict=True))
        pipe.send(
            {
                "replies": [list(out.outputs[0].token_ids) for out in outputs],
                "seconds": seconds,
                "tokens": tokens,
                # A sequence's step commits the accepted tokens and one of the target's own.
                "steps": tokens - accepted,
            }
        )
    llm.llm_engine.engine_core.shutdown()


def _totals(llm: Any) -> tuple[int, int]:
    """Tokens generated and drafted tokens accepted since the start, by vLLM's own count."""
    values = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    return int(values["vllm:generation_tokens"]), int(values.get("vllm:spec_decode_num_accepted_tokens", 0))


def compare(
    methods: Sequence[str], rounds: int, single: int, several: int, options: dict[str, Any]
) -> dict[tuple[str, int], dict[str, list[dict[str, Any]]]]:
    """Run all methods; returns every round's measurements by task and streams, and method."""
    prompts = {
        task: [prompt(text) for text in texts] for task, texts in tasks(WARM + rounds * (single + several)).items()
    }
    options["warm_up"] = [text for texts in prompts.values() for text in texts[:WARM]]
    spawn = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    for first in range(0, len(methods), AT_ONCE):
        starting = methods[first : first + AT_ONCE]
        for method in starting:
            pipes[method], other = spawn.Pipe()
            process = spawn.Process(target=worker, args=(method, options, other))
            process.start()
            other.close()
            processes.append(process)
        for method in starting:
            assert pipes[method].recv() == "ready"
            print(f"{method}: ready", flush=True)
    measured: dict[tuple[str, int], dict[str, list[dict[str, Any]]]] = {
        (task, streams): {method: [] for method in methods} for streams in (1, STREAMS) for task in prompts
    }
    try:
        at = WARM
        for number in range(rounds):
            for streams, count in ((1, single), (STREAMS, several)):
                for task, texts in prompts.items():
                    # Each round begins with another method, so that none always meets the machine in one mood.
                    for i in range(len(methods)):
                        method = methods[(i + number) % len(methods)]
                        pipes[method].send((texts[at : at + count], streams))
                        measured[task, streams][method].append(pipes[method].recv())
                at += count
            print(f"round {number + 1} of {rounds}", flush=True)
    finally:
        for pipe in pipes.values():
            pipe.send(None)
        for process in processes:
            process.join()
    return measured


def summarize(measured: dict[tuple[str, int], dict[str, list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    """A row for each task, number of streams and method; ratios are of all rounds together, and of single ones."""
    table = []
    for (task, streams), by_method in measured.items():
        plain = by_method["plain"]
        for method, rounds in by_method.items():
            speed = [one["tokens"] / one["seconds"] for one in rounds]
            ratios = [value * base["seconds"] / base["tokens"] for value, base in zip(speed, plain, strict=True)]
            replies = [
                (reply, expected)
                for one, base in zip(rounds, plain, strict=True)
                for reply, expected in zip(one["replies"], base["replies"], strict=True)
            ]
            table.append(
                {
                    "streams": streams,
                    "task": task,
                    "method": method,
                    "tokens/s": median(speed),
                    "times plain": median(ratios),
                    "lowest": min(ratios),
                    "highest": max(ratios),
                    "tokens/step": sum(one["tokens"] for one in rounds) / sum(one["steps"] for one in rounds),
                    "same replies": f"{sum(reply == expected for reply, expected in replies)} of {len(replies)}",
                }
            )
    return table


def main() -> None:
    """Parse, run, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a reply, at most (default 64)")
    parser.add_argument("--rounds", type=int, default=2, help="default 2")
    parser.add_argument("--single", type=int, default=2, help="prompts of a round and task, one at a time (default 2)")
    parser.add_argument(
        "--several", type=int, default=8, help=f"prompts of a round and task, {STREAMS} at once (default 8)"
    )
    parser.add_argument("--only", nargs="+", choices=[m for m in METHODS if m != "plain"], help="methods, beside plain")
    parser.add_argument("--out", type=Path, help="folder for the result files")
    given = parser.parse_args()
    methods = ["plain", *given.only] if given.only else list(METHODS)
    options = {"tokens": given.tokens, "width": 1024}
    measured = compare(methods, given.rounds, given.single, given.several, options)
    table = summarize(measured)
    note = (
        f"SmolLM2-135M-Instruct in float32, greedy, up to {given.tokens} tokens a reply, {DRAFTED} drafted tokens a "
        f"step at most. {given.rounds} rounds of fresh prompts of each task (`bench/tasks.py`), the methods taking "
        f"turns: {given.single} prompts one at a time, and {given.several} with {STREAMS} at once. Speeds are from end "
        "to end, reading the prompt included; speeds and ratios are medians over the rounds, lowest and highest are "
        "single rounds. Tokens a step are over all steps, with a draft or without. A reply may differ from plain's "
        "where the two best tokens are nearly equal."
    )
    show("Live decoding", table, note)
    saved = {
        f"{task}, {streams}": {
            m: [{k: v for k, v in one.items() if k != "replies"} for one in all_] for m, all_ in by_method.items()
        }
        for (task, streams), by_method in measured.items()
    }
    save("vllm_live", {"note": note, "table": table, "rounds": saved}, given.out)
    ((given.out or RESULTS) / "vllm_live.md").write_text(
        markdown("Live decoding in vLLM", table, note), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
