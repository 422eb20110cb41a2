"""Decode with real vLLM and the demo model, plain and with each speculative method, and compare the speed by task.

Each method has an engine in a process of its own, warmed up with some replies. All answer the same prompts in the same
order, first one at a time, then another set with 8 at once, and take turns at every step of the engine, so that they
meet the same machine; pacing's clock stands still while others have their turn. Every round has fresh prompts, so that
no method sees a question twice. Replies are compared with plain's.

    python bench/vllm_live.py [--rounds N] [--only METHOD ...] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

from harness import RESULTS, markdown, save, show
from tasks import tasks
from vllm_runs import prompt

STREAMS = 8
WARM = 3
DRAFTED = 12
STEP, DONE = "step", "done"
SETTLE = 0.01  # seconds
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


class Clock:
    """Seconds of the engine's own turns."""

    def __init__(self) -> None:
        self._before = 0.0
        self._since: float | None = None

    def __call__(self) -> float:
        return self._before + (0.0 if self._since is None else perf_counter() - self._since)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let it run."""
        self._since = perf_counter()
        try:
            yield
        finally:
            self._before, self._since = self(), None


def worker(method: str, options: dict[str, Any], pipe: Connection) -> None:
    """An engine that takes a step whenever it is told.

    What comes down the pipe: prompts to answer, `STEP` to take a step, after which it says whether anything is left,
    `DONE` to ask for the replies and measurements since the last time, or None to end.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    from freedraft.integrations.hf.smollm2 import demo_model_path

    clock = Clock()
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
        distributed_executor_backend="uni",
        speculative_config=speculative,
        additional_config={"freedraft": additional} if additional else {},
    )
    engine = llm.llm_engine
    if speculative is OURS:
        runner = engine.engine_core.engine_core.model_executor.driver_worker.model_runner
        # Before that it was the machine's.
        if (pacing := runner.drafter._drafting._pacing) is not None:
            pacing._clock = clock
    greedy = SamplingParams(temperature=0, max_tokens=options["tokens"])
    asked = 0
    replies: dict[int, list[int]] = {}
    before, started = _totals(llm), clock()
    pipe.send("ready")
    while (told := pipe.recv()) is not None:
        if told == DONE:
            tokens, accepted = (now - then for now, then in zip(_totals(llm), before, strict=True))
            if speculative is OURS:
                assert runner.drafter.statistics.errors == 0
            measured = {"seconds": clock() - started, "tokens": tokens, "steps": tokens - accepted}
            pipe.send({"replies": [reply for _, reply in sorted(replies.items())], **measured})
            replies = {}
            before, started = _totals(llm), clock()
        elif told == STEP:
            with clock.running():
                outputs = engine.step()
            replies |= {int(out.request_id): list(out.outputs[0].token_ids) for out in outputs if out.finished}
            pipe.send(engine.has_unfinished_requests())
        else:
            with clock.running():
                for text in told:
                    engine.add_request(str(asked), text, greedy)
                    asked += 1
            pipe.send(True)
    engine.engine_core.shutdown()


def answer(
    pipes: Mapping[str, Connection], prompts: Sequence[str], streams: int, first: int = 0
) -> dict[str, dict[str, Any]]:
    """Let all methods answer, one prompt at a time or, with several streams, all; returns what each measured.

    Method number `first` has the first turn. A sequence's step commits the accepted tokens and one of the target's own:
    so many `steps` were taken.
    """
    at_once = 1 if streams == 1 else len(prompts)
    parts = [prompts[i : i + at_once] for i in range(0, len(prompts), at_once)]
    names = list(pipes)
    waiting = {name: list(parts) for name in names[first:] + names[:first]}
    busy = dict.fromkeys(waiting, False)
    while waiting:
        for method in list(waiting):
            if not busy[method]:
                pipes[method].send(waiting[method].pop(0))
                pipes[method].recv()
            # Until the threads of the one before have gone to sleep.
            sleep(SETTLE)
            pipes[method].send(STEP)
            busy[method] = pipes[method].recv()
            if not busy[method] and not waiting[method]:
                del waiting[method]
    for pipe in pipes.values():
        pipe.send(DONE)
    return {method: pipe.recv() for method, pipe in pipes.items()}


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
        for streams, texts in ((STREAMS, slice(WARM)), (1, slice(1))):
            answer(pipes, [text for of_task in prompts.values() for text in of_task[texts]], streams)
        print("warm", flush=True)
        at = WARM
        for number in range(rounds):
            for streams, count in ((1, single), (STREAMS, several)):
                for turn, (task, texts) in enumerate(prompts.items()):
                    first = (number + turn) % len(methods)
                    for method, round_ in answer(pipes, texts[at : at + count], streams, first).items():
                        measured[task, streams][method].append(round_)
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
                    "tokens/s": _speed(rounds),
                    "times plain": _speed(rounds) / _speed(plain),
                    "lowest": min(ratios),
                    "highest": max(ratios),
                    "tokens/step": sum(one["tokens"] for one in rounds) / sum(one["steps"] for one in rounds),
                    "same replies": f"{sum(reply == expected for reply, expected in replies)} of {len(replies)}",
                }
            )
    return table


def _speed(rounds: Sequence[Mapping[str, Any]]) -> float:
    return float(sum(one["tokens"] for one in rounds) / sum(one["seconds"] for one in rounds))


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
        f"step at most. {given.rounds} rounds of fresh prompts of each task (`bench/tasks.py`): {given.single} one at "
        f"a time, and {given.several} with {STREAMS} at once; the methods take turns at every step. Speeds are from "
        "end to end, reading the prompt included, and of all rounds together; lowest and highest are single rounds. "
        "Tokens a step are over all steps, with a draft or without. A reply may differ from plain's where the two best "
        "tokens are nearly equal. Each engine is one process, with its worker in it."
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
