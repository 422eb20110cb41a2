"""The load step in real vLLM with the demo model: 1 stream, then 16, then 1 again, plain and with freedraft.

Each engine is in a process of its own. Phase by phase they take turns with the same prompts, JSON and code edits, fresh
ones in every phase. From freedraft's proposer come the tokens drafted and verified, in all and second by second, so
that one sees the drafting follow the load and come back. Time is the engine's own: the other's turns are left out.

    python bench/vllm_load.py [--tokens N] [--few N] [--many N] [--drafter NAME] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

from harness import RESULTS, markdown, save, show
from tasks import tasks
from vllm_runs import SPECULATIVE, prompt

STREAMS = 16
WARM = 4
WIDTH = 1024
# Within this the order of two logits depends on how many positions a forward pass has.
TIE = 1e-3
TASKS = ("JSON", "code edit")
COUNTS = ("steps", "sequence steps", "tokens", "drafted", "verified", "accepted", "errors")

Read = Callable[[], tuple[int, ...]]


def worker(freedraft: dict[str, Any] | None, warm: Sequence[str], tokens: int, pipe: Connection) -> None:
    """Answer the phases that come down the pipe until it says None; sends what was measured."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Only so can a function of ours be sent to vLLM's worker, where the proposer is.
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    from vllm import LLM

    from freedraft.integrations.hf.smollm2 import demo_model_path

    llm = LLM(
        model=str(demo_model_path()),
        dtype="float32",
        enforce_eager=True,
        max_num_seqs=STREAMS,
        max_model_len=WIDTH,
        enable_prefix_caching=False,
        speculative_config=None if freedraft is None else SPECULATIVE,
        additional_config={} if freedraft is None else {"freedraft": freedraft},
    )
    nothing = (0,) * len(COUNTS)
    read: Read = (lambda: nothing) if freedraft is None else (lambda: llm.collective_rpc(_totals)[0])
    drive(llm.llm_engine, warm, len(warm), tokens, "warm", read)
    pipe.send("ready")
    while (phase := pipe.recv()) is not None:
        name, prompts, streams = phase
        pipe.send(drive(llm.llm_engine, prompts, streams, tokens, name, read))
    errors = read()[-1]
    llm.llm_engine.engine_core.shutdown()
    if errors:
        raise SystemExit(f"{errors} failures in drafting")


def _totals(worker: Any) -> tuple[int, ...]:
    """COUNTS since the start, in vLLM's worker; what pacing withheld was drafted and not verified."""
    now = worker.model_runner.drafter.statistics
    verified = int(now.drafted.sum())
    accepted = int(now.accepted.sum())
    return now.steps, now.sequence_steps, now.tokens, verified + now.withheld, verified, accepted, now.errors


def drive(engine: Any, prompts: Sequence[str], streams: int, tokens: int, phase: str, read: Read) -> dict[str, Any]:
    """Answer the prompts, `streams` at a time, each as soon as another has ended."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=tokens)
    replies: dict[int, list[int]] = {}
    inputs: dict[int, list[int]] = {}
    asked = 0
    series = []
    began = since = perf_counter()
    first = before = read()
    while len(replies) < len(prompts):
        while asked < len(prompts) and asked - len(replies) < streams:
            engine.add_request(f"{phase}.{asked}", prompts[asked], greedy)
            asked += 1
        for out in engine.step():
            if out.finished:
                which = int(out.request_id.split("-")[0].rpartition(".")[2])
                replies[which] = list(out.outputs[0].token_ids)
                inputs[which] = list(out.prompt_token_ids)
        now = perf_counter()
        if now - since >= 1 or len(replies) == len(prompts):
            after = read()
            series.append({"until": now - began, **_difference(after, before)})
            since, before = now, after
    order = range(len(prompts))
    return {
        "seconds": perf_counter() - began,
        "tokens": sum(map(len, replies.values())),
        **{f"drafter's {name}": value for name, value in _difference(before, first).items()},
        "series": series,
        "prompts": [inputs[i] for i in order],
        "replies": [replies[i] for i in order],
    }


def _difference(now: tuple[int, ...], before: tuple[int, ...]) -> dict[str, int]:
    return {name: new - old for name, new, old in zip(COUNTS, now, before, strict=True)}


def compare(drafter: dict[str, Any], few: int, many: int, tokens: int) -> dict[str, dict[str, dict[str, Any]]]:
    """Run both engines; returns what was measured by phase and engine."""
    sizes = (WARM, few, many, few)
    by_task = tasks(-(-sum(sizes) // len(TASKS)))
    # The tasks alternate, so that every phase has as much of both.
    requests = [prompt(text) for texts in zip(*(by_task[task] for task in TASKS), strict=True) for text in texts]
    spawn = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    for name, given in (("plain", None), ("freedraft", drafter)):
        pipes[name], other = spawn.Pipe()
        process = spawn.Process(target=worker, args=(given, requests[:WARM], tokens, other))
        process.start()
        other.close()
        processes.append(process)
    for name, pipe in pipes.items():
        assert pipe.recv() == "ready"
        print(f"{name}: ready", flush=True)
    measured: dict[str, dict[str, dict[str, Any]]] = {}
    at = WARM
    try:
        for phase, count, streams in (("1 stream", few, 1), (f"{STREAMS} streams", many, STREAMS), ("1 again", few, 1)):
            measured[phase] = {}
            for name, pipe in pipes.items():
                pipe.send((phase.replace(" ", "_"), requests[at : at + count], streams))
                measured[phase][name] = pipe.recv()
                print(f"{phase}, {name}: {measured[phase][name]['seconds']:.1f} s", flush=True)
            at += count
    finally:
        for pipe in pipes.values():
            pipe.send(None)
        for process in processes:
            process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("an engine failed; see above")
    return measured


def count_ties(measured: dict[str, dict[str, dict[str, Any]]]) -> dict[str, tuple[int, int]]:
    """By phase: replies that leave plain's at a tie of the two best tokens, and those that leave it otherwise."""
    others = {
        phase: [
            (ids, reply, expected)
            for ids, reply, expected in zip(
                engines["plain"]["prompts"], engines["freedraft"]["replies"], engines["plain"]["replies"], strict=True
            )
            if reply != expected
        ]
        for phase, engines in measured.items()
    }
    if not any(others.values()):
        return dict.fromkeys(measured, (0, 0))
    # Only then is the model needed here.
    import torch
    from transformers import AutoModelForCausalLM

    from freedraft.integrations.hf.smollm2 import demo_model_path

    model = AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32).eval()
    ties = {phase: sum(_is_tie(model, *one) for one in found) for phase, found in others.items()}
    return {phase: (ties[phase], len(found) - ties[phase]) for phase, found in others.items()}


def _is_tie(model: Any, prompt_ids: Sequence[int], reply: Sequence[int], expected: Sequence[int]) -> bool:
    """Whether the replies part between the model's two best tokens, and these are within TIE."""
    import torch

    at = next((i for i, (a, b) in enumerate(zip(reply, expected, strict=False)) if a != b), None)
    if at is None:
        return False
    with torch.inference_mode():
        best = model(torch.tensor([[*prompt_ids, *expected[:at]]])).logits[0, -1].topk(2)
    return {reply[at], expected[at]} == set(best.indices.tolist()) and float(best.values[0] - best.values[1]) < TIE


def summarize(measured: dict[str, dict[str, dict[str, Any]]], ties: dict[str, tuple[int, int]]) -> list[dict[str, Any]]:
    """A row a phase. A step is a sequence's share in an engine step."""
    table = []
    for phase, engines in measured.items():
        plain, ours = engines["plain"], engines["freedraft"]
        base, speed = (one["tokens"] / one["seconds"] for one in (plain, ours))
        steps = ours["drafter's sequence steps"]
        same = sum(a == b for a, b in zip(plain["replies"], ours["replies"], strict=True))
        table.append(
            {
                "phase": phase,
                "plain tokens/s": base,
                "freedraft tokens/s": speed,
                "times plain": speed / base,
                "tokens/step": ours["drafter's tokens"] / steps,
                "drafted/step": ours["drafter's drafted"] / steps,
                "verified/step": ours["drafter's verified"] / steps,
                "accepted/step": ours["drafter's accepted"] / steps,
                "identical": f"{same} of {len(plain['replies'])}",
                "ties": ties[phase][0],
                "different": ties[phase][1],
            }
        )
    return table


def time_series(measured: dict[str, dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """About every second of the freedraft engine's own time: its rows and what was drafted and verified a step."""
    points = []
    offset = 0.0
    for phase, engines in measured.items():
        for one in engines["freedraft"]["series"]:
            steps = one["sequence steps"]
            points.append(
                {
                    "seconds": offset + one["until"],
                    "phase": phase,
                    "rows": steps / one["steps"] if one["steps"] else 0.0,
                    **{f"{name}/step": one[name] / steps if steps else 0.0 for name in ("drafted", "verified")},
                }
            )
        offset += engines["freedraft"]["seconds"]
    return points


def plot(points: Sequence[dict[str, Any]], path: Path) -> None:
    """Tokens drafted and verified a step over time, above the number of sequences."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (upper, lower) = pyplot.subplots(2, sharex=True, figsize=(7, 4), height_ratios=(3, 1))
    seconds = [one["seconds"] for one in points]
    for name in ("drafted", "verified"):
        upper.step(seconds, [one[f"{name}/step"] for one in points], where="pre", label=name)
    upper.set_ylabel("tokens a sequence's step")
    upper.legend()
    lower.step(seconds, [one["rows"] for one in points], where="pre", color="grey")
    lower.set_ylabel("sequences")
    lower.set_xlabel("seconds of the engine's own time")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    """Parse, run, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a reply, at most (default 128)")
    parser.add_argument("--few", type=int, default=6, help="prompts of a phase of one stream (default 6)")
    parser.add_argument("--many", type=int, default=30, help=f"prompts of the {STREAMS} streams (default 30)")
    parser.add_argument("--drafter", default="fusion", help="default fusion")
    parser.add_argument("--out", type=Path, help="folder for the result files")
    given = parser.parse_args()
    started = perf_counter()
    measured = compare({"drafter": given.drafter}, given.few, given.many, given.tokens)
    ties = count_ties(measured)
    table, points = summarize(measured, ties), time_series(measured)
    note = (
        f"SmolLM2-135M-Instruct in float32, greedy, up to {given.tokens} tokens a reply, drafter {given.drafter} with "
        f"its default settings, {SPECULATIVE['num_speculative_tokens']} drafted tokens a step at most. Prompts: JSON "
        f"and code edits in turn (`bench/tasks.py`), {given.few}, {given.many} and {given.few} fresh ones in the three "
        f"phases, after a warm-up with {WARM}. Both engines answer the same ones, one engine after the other in every "
        "phase. The drafter keeps what it learns, so that the last phase meets a more experienced one than the first. "
        "Speeds are from end to end, reading the prompt included. A step is one sequence's share in an engine step; "
        "drafted is what the drafter had, verified what pacing left of it. Ties are replies that leave plain's where "
        f"the two best logits are within {TIE:g}; different are those that leave it otherwise."
    )
    show("The load step in vLLM", table)
    print(note)
    print(f"{perf_counter() - started:.0f} s")
    folder = given.out or RESULTS
    phases = {
        phase: {
            name: {key: value for key, value in one.items() if key not in ("prompts", "replies", "series")}
            for name, one in engines.items()
        }
        for phase, engines in measured.items()
    }
    save("vllm_load", {"note": note, "table": table, "phases": phases, "series": points}, given.out)
    picture = "vllm_load.png" if find_spec("matplotlib") else None
    if picture is not None:
        plot(points, folder / picture)
    page = markdown("The load step in vLLM", table, note)
    if picture is not None:
        page += f"\n![Tokens drafted and verified a step over time]({picture})\n"
    (folder / "vllm_load.md").write_text(page, encoding="utf-8")
    if different := sum(count for _, count in ties.values()):
        raise SystemExit(f"{different} replies differ from plain's, and not at a tie")


if __name__ == "__main__":
    main()
