"""Decode with real vLLM and the demo model, plain and with each speculative method, and compare the speed by task.

Each method has an engine in a process of its own, warmed up with some replies. All answer the same prompts in the same
order, first some one at a time, then others with 8 at once, and take turns at every step of the engine, so that they
meet the same machine; pacing's clock stands still while others have their turn. Every round has fresh prompts, so that
no method sees a question twice. Replies are compared with plain's.

    python bench/vllm_live.py [--rounds N] [--only METHOD ...] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

from harness import RESULTS, markdown, save, show
from tasks import tasks
from vllm_engines import Method, Options, answer, engines, freedraft
from vllm_runs import prompt

STREAMS = 8
WARM = 4
DRAFTED = 12
PLAIN = "plain"
METHODS: dict[str, Method] = {
    PLAIN: Method(),
    # What vLLM itself spends on having a proposer, whatever it drafts.
    "freedraft without a draft": freedraft(DRAFTED, drafter="suffix_automaton", min_expected=1e6),
    **{
        f"vLLM ngram {least}..{most}": Method(
            {
                "method": "ngram",
                "num_speculative_tokens": DRAFTED,
                "prompt_lookup_min": least,
                "prompt_lookup_max": most,
            }
        )
        for least, most in ((2, 5), (1, 4))
    },
    "vLLM suffix": Method({"method": "suffix", "num_speculative_tokens": DRAFTED}),
    "freedraft fusion": freedraft(DRAFTED, drafter="fusion"),
}


def compare(
    names: Sequence[str], rounds: int, single: int, several: int, options: Options
) -> dict[tuple[str, int], dict[str, list[dict[str, Any]]]]:
    """Run the methods; returns every round's measurements by task and streams, and method."""
    prompts = {
        task: [prompt(text) for text in texts] for task, texts in tasks(WARM + rounds * (single + several)).items()
    }
    parts = [(streams, count) for streams, count in ((1, single), (STREAMS, several)) if count]
    measured: dict[tuple[str, int], dict[str, list[dict[str, Any]]]] = {
        (task, streams): {name: [] for name in names} for streams, _ in parts for task in prompts
    }
    with engines({name: METHODS[name] for name in names}, options) as pipes:
        # Other prompts alone than together: who repeats a question teaches that replies are repeated.
        for streams, texts in ((STREAMS, slice(WARM - 1)), (1, slice(WARM - 1, WARM))):
            answer(pipes, [text for of_task in prompts.values() for text in of_task[texts]], streams)
        print("warm", flush=True)
        at = WARM
        for number in range(rounds):
            for streams, count in parts:
                for turn, (task, texts) in enumerate(prompts.items()):
                    first = (number + turn) % len(names)
                    for name, round_ in answer(pipes, texts[at : at + count], streams, first).items():
                        measured[task, streams][name].append(round_)
                at += count
            print(f"round {number + 1} of {rounds}", flush=True)
    return measured


def summarize(measured: dict[tuple[str, int], dict[str, list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    """A row for each task, number of streams and method; ratios are of all rounds together, and of single ones."""
    table = []
    for (task, streams), by_method in measured.items():
        plain = by_method[PLAIN]
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
    parser.add_argument(
        "--single", type=int, default=2, help="prompts of a round and task, one at a time (default 2; 0: none)"
    )
    parser.add_argument(
        "--several", type=int, default=8, help=f"prompts of a round and task, {STREAMS} at once (default 8; 0: none)"
    )
    parser.add_argument("--only", nargs="+", choices=[m for m in METHODS if m != PLAIN], help="methods, beside plain")
    parser.add_argument("--out", type=Path, help="folder for the result files")
    given = parser.parse_args()
    if not given.single + given.several:
        parser.error("--single 0 --several 0: nothing to do")
    methods = [PLAIN, *given.only] if given.only else list(METHODS)
    measured = compare(methods, given.rounds, given.single, given.several, Options(STREAMS, 1024, given.tokens))
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
            m: [{k: one[k] for k in ("seconds", "tokens", "steps")} for one in all_] for m, all_ in by_method.items()
        }
        for (task, streams), by_method in measured.items()
    }
    save("vllm_live", {"note": note, "table": table, "rounds": saved}, given.out)
    ((given.out or RESULTS) / "vllm_live.md").write_text(
        markdown("Live decoding in vLLM", table, note), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
