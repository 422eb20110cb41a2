"""Engines of real vLLM, each in a process of its own, that answer the same prompts and take turns at every step.

So all meet the same machine, however its speed changes; each one's clock, pacing's too, stands still while others have
their turn.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from time import perf_counter, sleep
from typing import Any

STEP, DONE = "step", "done"
SETTLE = 0.01  # seconds
AT_ONCE = 2  # engines that start at the same time
COUNTS = ("steps", "sequence steps", "tokens", "drafted", "verified", "accepted")


@dataclass(frozen=True)
class Options:
    """What all engines have in common: sequences, tokens of a sequence and of a reply, at most; bytes of KV cache."""

    streams: int
    width: int
    tokens: int
    # More than the streams need, and with all engines together less than the machine has.
    kv_cache: int = 2**29


@dataclass(frozen=True)
class Method:
    """How an engine decodes: vLLM's `speculative_config`, and freedraft's configuration."""

    speculative: Mapping[str, Any] | None = None
    config: Mapping[str, Any] | None = None

    @property
    def is_freedraft(self) -> bool:
        """Whether freedraft drafts."""
        return self.speculative is not None and "freedraft" in str(self.speculative.get("model"))


def freedraft(drafted: int, **config: Any) -> Method:
    """freedraft with such a configuration, up to `drafted` tokens a step."""
    proposer = "freedraft.integrations.vllm.Proposer"
    return Method({"method": "custom_class", "model": proposer, "num_speculative_tokens": drafted}, config)


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


@contextmanager
def engines(methods: Mapping[str, Method], options: Options) -> Iterator[dict[str, Connection]]:
    """Start an engine for each method; yields the pipes to them. One that fails to start raises EOFError here.

    Raises:
        SystemExit: at the end, if one has failed.
    """
    spawn = multiprocessing.get_context("spawn")
    names = list(methods)
    pipes: dict[str, Connection] = {}
    processes = []
    try:
        for first in range(0, len(names), AT_ONCE):
            starting = names[first : first + AT_ONCE]
            for name in starting:
                pipes[name], other = spawn.Pipe()
                process = spawn.Process(target=_worker, args=(methods[name], options, other))
                process.start()
                other.close()
                processes.append(process)
            for name in starting:
                assert pipes[name].recv() == "ready"
                print(f"{name}: ready", flush=True)
        yield pipes
    finally:
        for pipe in pipes.values():
            with suppress(OSError):  # it has ended already
                pipe.send(None)
        for process in processes:
            process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("an engine failed; see above")


def answer(
    pipes: Mapping[str, Connection], prompts: Sequence[str], streams: int, first: int = 0
) -> dict[str, dict[str, Any]]:
    """Let all engines answer, `streams` prompts at a time, each as soon as another has ended.

    Engine number `first` has the first turn.

    Returns:
        What each measured: token ids of `prompts` and `replies`, its `seconds`, `tokens`, and `steps`: a sequence's
        step commits the accepted tokens and one of the target's own. With freedraft `series` has COUNTS about every
        second, since the last time, and `until` when; `errors` are its failures in drafting.
    """
    names = list(pipes)
    waiting = {name: list(prompts) for name in names[first:] + names[:first]}
    busy = dict.fromkeys(waiting, 0)
    while waiting:
        for name in list(waiting):
            if new := waiting[name][: streams - busy[name]]:
                del waiting[name][: len(new)]
                pipes[name].send(new)
                pipes[name].recv()
            # Until the threads of the one before have gone to sleep.
            sleep(SETTLE)
            pipes[name].send(STEP)
            busy[name] = pipes[name].recv()
            if not busy[name] and not waiting[name]:
                del waiting[name]
    for pipe in pipes.values():
        pipe.send(DONE)
    measured = {name: pipe.recv() for name, pipe in pipes.items()}
    assert not any(one["errors"] for one in measured.values()), "drafting failed"
    return measured


def _worker(method: Method, options: Options, pipe: Connection) -> None:
    """An engine that takes a step whenever it is told.

    What comes down the pipe: prompts to answer, `STEP` to take a step, after which it says how many are not answered
    yet, `DONE` to ask for what was measured since the last time, or None to end.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    from freedraft.integrations.hf.smollm2 import demo_model_path

    clock = Clock()
    llm = LLM(
        model=str(demo_model_path()),
        dtype="float32",
        enforce_eager=True,
        max_num_seqs=options.streams,
        max_model_len=options.width,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=options.kv_cache,
        disable_log_stats=False,
        distributed_executor_backend="uni",
        speculative_config=None if method.speculative is None else dict(method.speculative),
        additional_config={"freedraft": dict(method.config)} if method.config else {},
    )
    engine = llm.llm_engine
    proposer = None
    if method.is_freedraft:
        proposer = engine.engine_core.engine_core.model_executor.driver_worker.model_runner.drafter
        # Before that it was the machine's.
        if (pacing := proposer._drafting._pacing) is not None:
            pacing._clock = clock
    greedy = SamplingParams(temperature=0, max_tokens=options.tokens)
    asked = 0
    answered: dict[int, Any] = {}
    series: list[dict[str, Any]] = []
    before, started, since, counted = _totals(llm), clock(), clock(), _counts(proposer)
    pipe.send("ready")
    while (told := pipe.recv()) is not None:
        if told == STEP:
            with clock.running():
                outputs = engine.step()
            answered |= {int(out.request_id): out for out in outputs if out.finished}
            left = engine.get_num_unfinished_requests()
            if clock() - since >= 1 or not left:
                since, last, counted = clock(), counted, _counts(proposer)
                series.append({"until": since - started, **{name: counted[name] - last[name] for name in counted}})
            pipe.send(left)
        elif told == DONE:
            tokens, accepted = (now - then for now, then in zip(_totals(llm), before, strict=True))
            outputs = [out for _, out in sorted(answered.items())]
            pipe.send(
                {
                    "prompts": [list(out.prompt_token_ids) for out in outputs],
                    "replies": [list(out.outputs[0].token_ids) for out in outputs],
                    "seconds": clock() - started,
                    "tokens": tokens,
                    "steps": tokens - accepted,
                    "series": series if proposer is not None else [],
                    "errors": 0 if proposer is None else proposer.statistics.errors,
                }
            )
            answered, series = {}, []
            before, started, since = _totals(llm), clock(), clock()
        else:
            with clock.running():
                for text in told:
                    engine.add_request(str(asked), text, greedy)
                    asked += 1
            pipe.send(True)
    engine.engine_core.shutdown()


def _totals(llm: Any) -> tuple[int, int]:
    """Tokens generated and drafted tokens accepted since the start, by vLLM's own count."""
    values = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    return int(values["vllm:generation_tokens"]), int(values.get("vllm:spec_decode_num_accepted_tokens", 0))


def _counts(proposer: Any) -> dict[str, int]:
    """COUNTS since the start, of the proposer; what pacing withheld was drafted and not verified."""
    if proposer is None:
        return {}
    now = proposer.statistics
    verified, accepted = int(now.drafted.sum()), int(now.accepted.sum())
    counts = (now.steps, now.sequence_steps, now.tokens, verified + now.withheld, verified, accepted)
    return dict(zip(COUNTS, counts, strict=True))
