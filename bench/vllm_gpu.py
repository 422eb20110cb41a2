"""Decode with real vLLM on a GPU, plain and with each n-gram drafter and freedraft, and compare replies and speed.

Each method has an engine in a process of its own; all stay on the GPU and take turns, round by round, with fresh
prompts: first some one at a time, then more at once. Methods of vLLM's V1 model runner are compared with plain decoding
there, those of the V2 runner with plain decoding there. A V2 method whose vLLM has no n-gram speculator in that runner
is left out, as is an engine that does not start; the result says why. A reply that is not the same as plain's is
followed to its first other token, and plain says how far apart its two best tokens were there: at a tie, the shape of a
batch decides.

    python bench/vllm_gpu.py --model FOLDER [--eager] [--attention-backend NAME] [--dtype bfloat16]
                             [--only METHOD ...] [--rounds N] [--tokens N] [--streams N ...] [--out FOLDER]

It needs freedraft installed, not only on the path: vLLM and freedraft find each other through entry points. Prompts are
in the chat format of SmolLM2 and Qwen. An engine takes a minute to start without --eager, which is for first tries:
--only and several runs with other --out folders keep a run short.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

from harness import median, save, show
from nvidia_smi import described
from tasks import tasks
from vllm_runs import prompt

WARM = 2
DRAFTED = 8
LOOKUP = {"num_speculative_tokens": DRAFTED, "prompt_lookup_min": 2, "prompt_lookup_max": 5}
OURS = {
    "method": "custom_class",
    "model": "freedraft.integrations.vllm.Proposer",
    "num_speculative_tokens": DRAFTED,
}
V2_FILE = "v1/worker/gpu/spec_decode/ngram/speculator.py"


class Method(NamedTuple):
    """A way to decode: the model runner (1 or 2), speculative_config, freedraft's section, and who must draft."""

    runner: int
    speculative: dict[str, Any] | None = None
    freedraft: dict[str, Any] | None = None
    drafter: str | None = None


METHODS = {
    "plain V1": Method(1),
    "ngram V1": Method(1, {"method": "ngram", **LOOKUP}),
    "ngram_gpu V1": Method(1, {"method": "ngram_gpu", **LOOKUP}),
    "freedraft suffix_automaton V1": Method(1, OURS, {"drafter": "suffix_automaton"}, "Proposer"),
    "freedraft fusion V1": Method(1, OURS, {"drafter": "fusion"}, "Proposer"),
    "plain V2": Method(2),
    "ngram_gpu V2": Method(2, {"method": "ngram_gpu", **LOOKUP}, None, "NgramGPUSpeculator"),
    "freedraft V2": Method(2, {"method": "ngram_gpu", **LOOKUP}, {"gpu": {}}, "ScanSpeculator"),
}


def worker(name: str, options: dict[str, Any], pipe: Connection) -> None:
    """Start an engine and answer the jobs that come down the pipe until it says None.

    The first answer is "ready" or why it is not. Jobs: `("answer", prompts, streams)` -> measurements;
    `("gaps", beginnings)` -> of each, the difference of the two best log-probabilities of what follows.
    """
    method = METHODS[name]
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = str(method.runner - 1)
    # Only so can a function of ours be sent to vLLM's worker, where the drafter is.
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    for variable, value in (("VLLM_LOGGING_LEVEL", "WARNING"), ("VLLM_NO_USAGE_STATS", "1")):
        os.environ.setdefault(variable, value)
    try:
        from vllm import LLM, SamplingParams

        llm = LLM(
            max_num_seqs=max(options["streams"]),
            enable_prefix_caching=False,
            disable_log_stats=False,
            seed=0,
            speculative_config=method.speculative,
            additional_config={} if method.freedraft is None else {"freedraft": method.freedraft},
            **options["engine"],
        )
        greedy = SamplingParams(temperature=0, max_tokens=options["tokens"])
        llm.generate(options["warm"], greedy, use_tqdm=False)
        llm.generate(options["warm"][0], greedy, use_tqdm=False)
        drafter, errors = llm.collective_rpc(_drafter)[0]
        if method.drafter not in (None, drafter):
            raise RuntimeError(f"{method.drafter} was to draft, and {drafter} does")
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}"[:500])
        return
    pipe.send("ready")
    while (job := pipe.recv()) is not None:
        what, texts, *rest = job
        if what == "gaps":
            following = SamplingParams(temperature=0, max_tokens=1, logprobs=2)
            outputs = llm.generate([{"prompt_token_ids": ids} for ids in texts], following, use_tqdm=False)
            pipe.send([_gap(out.outputs[0].logprobs[0]) for out in outputs])
        else:
            pipe.send(_answered(llm, texts, rest[0], greedy))
    drafter, errors = llm.collective_rpc(_drafter)[0]
    pipe.send(errors)
    llm.llm_engine.engine_core.shutdown()


def _drafter(worker: Any) -> tuple[str | None, int]:
    """The class that drafts in vLLM's worker, and its failures if it counts them."""
    runner = worker.model_runner
    drafter = getattr(runner, "speculator", None) or getattr(runner, "drafter", None)
    counted = getattr(drafter, "statistics", drafter)
    return None if drafter is None else type(drafter).__name__, int(getattr(counted, "errors", 0))


def _gap(candidates: Mapping[int, Any]) -> float:
    first, second = sorted((candidate.logprob for candidate in candidates.values()), reverse=True)[:2]
    return float(first - second)


def _answered(llm: Any, prompts: Sequence[str], streams: int, greedy: Any) -> dict[str, Any]:
    before = _totals(llm)
    started = perf_counter()
    outputs = []
    for i in range(0, len(prompts), streams):
        outputs += llm.generate(prompts[i : i + streams], greedy, use_tqdm=False)
    seconds = perf_counter() - started
    tokens, accepted = (now - then for now, then in zip(_totals(llm), before, strict=True))
    return {
        "prompts": [list(out.prompt_token_ids) for out in outputs],
        "replies": [list(out.outputs[0].token_ids) for out in outputs],
        "seconds": seconds,
        "tokens": tokens,
        # A sequence's step commits the accepted tokens and one of the target's own.
        "steps": tokens - accepted,
    }


def _totals(llm: Any) -> tuple[int, int]:
    """Tokens generated and drafted tokens accepted since the start, by vLLM's own count."""
    values = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    return int(values["vllm:generation_tokens"]), int(values.get("vllm:spec_decode_num_accepted_tokens", 0))


class Engines:
    """The engines that started, a process each; `refused`: why the others did not."""

    def __init__(self, names: Sequence[str], options: dict[str, Any]) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.refused: dict[str, str] = {}
        self.errors: dict[str, int] = {}
        self._pipes: dict[str, Connection] = {}
        self._processes = []
        for name in names:
            reason = missing(METHODS[name])
            if reason is None:
                pipe, other = spawn.Pipe()
                process = spawn.Process(target=worker, args=(name, options, other))
                process.start()
                other.close()
                self._processes.append(process)
                try:
                    reason = pipe.recv()
                except EOFError:
                    reason = "its process ended; see what it printed"
                if reason == "ready":
                    self._pipes[name] = pipe
                    print(f"{name}: ready", flush=True)
                    continue
            self.refused[name] = reason
            print(f"{name}: left out: {reason}", flush=True)

    @property
    def names(self) -> list[str]:
        return list(self._pipes)

    def ask(self, name: str, *job: Any) -> Any:
        self._pipes[name].send(job)
        return self._pipes[name].recv()

    def close(self) -> None:
        for name, pipe in self._pipes.items():
            try:
                pipe.send(None)
                self.errors[name] = pipe.recv()
            except (EOFError, OSError):
                self.errors[name] = -1
        for process in self._processes:
            process.join()


def missing(method: Method) -> str | None:
    """What a method needs and is not here; None if nothing."""
    if method.runner == 2 and method.speculative is not None:
        # Looked for as a file: to import its package takes vLLM half a minute.
        vllm = find_spec("vllm")
        folders = [] if vllm is None else vllm.submodule_search_locations or []
        if not any((Path(folder) / V2_FILE).is_file() for folder in folders):
            return f"this vLLM has no {V2_FILE}"
    if method.freedraft is not None and "freedraft" not in entry_points(group="vllm.general_plugins").names:
        return "freedraft is not installed: vLLM finds no entry point of it"
    return None


def measure(engines: Any, prompts: dict[str, list[str]], rounds: int, counts: dict[int, int]) -> list[dict[str, Any]]:
    """A record for each round, task, number of streams and method. `counts`: streams -> prompts of a round and task."""
    records = []
    at = WARM
    for number in range(rounds):
        for streams, count in counts.items():
            for task, texts in prompts.items():
                names = engines.names
                # Each round begins with another method, so that none always meets the machine in one mood.
                for i in range(len(names)):
                    name = names[(i + number) % len(names)]
                    answered = engines.ask(name, "answer", texts[at : at + count], streams)
                    records.append({"round": number, "streams": streams, "task": task, "method": name, **answered})
            at += count
        print(f"round {number + 1} of {rounds}", flush=True)
    return records


def compared(engines: Any, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each number of streams, task and method, beside plain decoding of the same runner."""
    groups: dict[tuple[int, str, str], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["streams"], record["task"], record["method"]), []).append(record)
    rows = []
    for (streams, task, name), own in groups.items():
        base = f"plain V{METHODS[name].runner}"
        plain = groups.get((streams, task, base))
        row: dict[str, Any] = {"streams": streams, "task": task, "method": name}
        row["tokens/s"] = median([one["tokens"] / one["seconds"] for one in own])
        row["tokens/step"] = sum(one["tokens"] for one in own) / sum(one["steps"] for one in own)
        if plain is None:
            row |= {"times plain": None, "lowest": None, "highest": None, "same replies": None, "gaps": None}
        else:
            pairs = list(zip(own, plain, strict=True))
            ratios = [one["tokens"] / one["seconds"] * two["seconds"] / two["tokens"] for one, two in pairs]
            beginnings = [found for one, two in pairs for found in partings(one, two)]
            replies = sum(len(one["replies"]) for one in own)
            row |= {"times plain": median(ratios), "lowest": min(ratios), "highest": max(ratios)}
            row["same replies"] = f"{replies - len(beginnings)} of {replies}"
            gaps = engines.ask(base, "gaps", beginnings) if beginnings else []
            row["gaps"] = ", ".join(f"{gap:.3f}" for gap in gaps)
        rows.append(row)
    return rows


def partings(one: dict[str, Any], two: dict[str, Any]) -> list[list[int]]:
    """Of replies that differ, the prompt and the tokens that they have in common."""
    found = []
    for prompt_ids, ours, theirs in zip(two["prompts"], one["replies"], two["replies"], strict=True):
        if ours != theirs:
            common = next(
                (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
            )
            found.append([*prompt_ids, *theirs[:common]])
    return found


def main() -> None:
    """Parse, run, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or name of the model")
    parser.add_argument("--dtype", default="bfloat16", help="default bfloat16")
    parser.add_argument("--eager", action="store_true", help="no compilation and no CUDA graphs of the model")
    parser.add_argument("--attention-backend", help="for example TRITON_ATTN")
    parser.add_argument("--memory", type=float, default=0.1, help="of the GPU's memory, for each engine (default 0.1)")
    parser.add_argument("--width", type=int, default=2048, help="tokens of a sequence, at most (default 2048)")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a reply, at most (default 128)")
    parser.add_argument("--rounds", type=int, default=2, help="default 2")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8], help="sequences at once (default 1 and 8)")
    parser.add_argument("--only", nargs="+", choices=list(METHODS), default=list(METHODS), help="methods")
    parser.add_argument("--out", type=Path, help="folder for the result file")
    given = parser.parse_args()
    counts = {streams: 2 if streams == 1 else streams for streams in given.streams}
    texts = tasks(WARM + given.rounds * sum(counts.values()))
    prompts = {task: [prompt(text) for text in some] for task, some in texts.items()}
    engine = {
        "model": given.model,
        "dtype": given.dtype,
        "enforce_eager": given.eager,
        "max_model_len": given.width,
        "gpu_memory_utilization": given.memory,
    }
    if given.attention_backend:
        engine["attention_backend"] = given.attention_backend
    options = {
        "engine": engine,
        "streams": given.streams,
        "tokens": given.tokens,
        "warm": [text for some in prompts.values() for text in some[:WARM]],
    }
    engines = Engines(given.only, options)
    try:
        if not engines.names:
            raise SystemExit("no engine started")
        records = measure(engines, prompts, given.rounds, counts)
        rows = compared(engines, records)
    finally:
        engines.close()
    show("Decoding on a GPU", rows)
    result = {
        "gpu": described(),
        "options": {**options, "engine": {**engine, "model": Path(given.model).name}, "warm": len(options["warm"])},
        "left out": engines.refused,
        "failures in drafting": engines.errors,
        "table": rows,
        "rounds": [{k: v for k, v in record.items() if k not in ("prompts", "replies")} for record in records],
    }
    print("written to", save("vllm_gpu", result, given.out))


if __name__ == "__main__":
    main()
