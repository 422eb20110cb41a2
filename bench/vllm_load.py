"""The load step in real vLLM with the demo model: 1 stream, then 16, then 1 again, plain and with freedraft.

Both engines answer the same prompts, JSON and code edits, fresh ones in every phase, and take turns at every step
(`vllm_engines`). From freedraft's proposer come the tokens drafted and verified, in all and second by second, so that
one sees the drafting follow the load and come back.

    python bench/vllm_load.py [--tokens N] [--few N] [--many N] [--drafter NAME] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

from harness import RESULTS, markdown, save, show
from tasks import tasks
from vllm_engines import COUNTS, Method, Options, answer, engines, freedraft
from vllm_runs import prompt

STREAMS = 16
WARM = 4
DRAFTED = 12
# Within this the order of two logits depends on how many positions a forward pass has.
TIE = 1e-3
TASKS = ("JSON", "code edit")


def compare(drafter: str, few: int, many: int, tokens: int) -> dict[str, dict[str, dict[str, Any]]]:
    """Run both engines; returns what was measured by phase and engine."""
    sizes = (WARM, few, many, few)
    by_task = tasks(-(-sum(sizes) // len(TASKS)))
    # The tasks alternate, so that every phase has as much of both.
    requests = [prompt(text) for texts in zip(*(by_task[task] for task in TASKS), strict=True) for text in texts]
    measured: dict[str, dict[str, dict[str, Any]]] = {}
    methods = {"plain": Method(), "freedraft": freedraft(DRAFTED, drafter=drafter)}
    with engines(methods, Options(STREAMS, 1024, tokens, kv_cache=2**30)) as pipes:
        answer(pipes, requests[:WARM], WARM)
        at = WARM
        for phase, count, streams in (("1 stream", few, 1), (f"{STREAMS} streams", many, STREAMS), ("1 again", few, 1)):
            measured[phase] = answer(pipes, requests[at : at + count], streams)
            print(phase, *(f"{name}: {one['seconds']:.1f} s" for name, one in measured[phase].items()), flush=True)
            at += count
    return measured


def count_ties(measured: dict[str, dict[str, dict[str, Any]]]) -> dict[str, tuple[int, int]]:
    """By phase: replies that leave plain's at a tie of the two best tokens, and those that leave it otherwise."""
    others = {
        phase: [
            (ids, reply, expected)
            for ids, reply, expected in zip(
                both["plain"]["prompts"], both["freedraft"]["replies"], both["plain"]["replies"], strict=True
            )
            if reply != expected
        ]
        for phase, both in measured.items()
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
    for phase, both in measured.items():
        plain, drafting = both["plain"], both["freedraft"]
        base, speed = (one["tokens"] / one["seconds"] for one in (plain, drafting))
        counts = {name: sum(one[name] for one in drafting["series"]) for name in COUNTS}
        steps = counts["sequence steps"]
        same = sum(a == b for a, b in zip(plain["replies"], drafting["replies"], strict=True))
        table.append(
            {
                "phase": phase,
                "plain tokens/s": base,
                "freedraft tokens/s": speed,
                "times plain": speed / base,
                "tokens/step": counts["tokens"] / steps,
                "drafted/step": counts["drafted"] / steps,
                "verified/step": counts["verified"] / steps,
                "accepted/step": counts["accepted"] / steps,
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
    for phase, both in measured.items():
        for one in both["freedraft"]["series"]:
            steps = one["sequence steps"]
            points.append(
                {
                    "seconds": offset + one["until"],
                    "phase": phase,
                    "rows": steps / one["steps"] if one["steps"] else 0.0,
                    **{f"{name}/step": one[name] / steps if steps else 0.0 for name in ("drafted", "verified")},
                }
            )
        offset += both["freedraft"]["seconds"]
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
    measured = compare(given.drafter, given.few, given.many, given.tokens)
    ties = count_ties(measured)
    table, points = summarize(measured, ties), time_series(measured)
    note = (
        f"SmolLM2-135M-Instruct in float32, greedy, up to {given.tokens} tokens a reply, drafter {given.drafter} with "
        f"its default settings, {DRAFTED} drafted tokens a step at most. Prompts: JSON and code edits in turn "
        f"(`bench/tasks.py`), {given.few}, {given.many} and {given.few} fresh ones in the three phases, after a "
        f"warm-up with {WARM}. Both engines answer the same ones and take turns at every step; each is one process, "
        "with its worker in it. The drafter keeps what it learns, so that the last phase meets a more experienced one "
        "than the first. "
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
            for name, one in both.items()
        }
        for phase, both in measured.items()
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
