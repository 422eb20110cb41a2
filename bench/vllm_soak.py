"""Let real vLLM with freedraft work for long: random arrivals, aborts and lengths, and too small a KV cache.

Beside it another engine does the same, without drafts or with vLLM's own n-gram drafts. Each reply is compared with
that engine's: the same, or another from a token on where the two best ones are within 1e-3. freedraft's engine must not
grow more than the other: what vLLM and torch take over time, more with drafts than without, is not ours. Nothing may
fail.

    python bench/vllm_soak.py [--minutes 20] [--beside ngram] [--prompts FOLDER] [--drafter NAME] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

from harness import save
from vllm_prompts import live_prompts
from vllm_runs import WIDTH, assert_same, engine
from vllm_runs import statistics as totals

from freedraft.integrations.hf.smollm2 import demo_model_path

LONGEST = 96
WAITING = 40
# Little, so that it is full, and pages of it are used again, long before the end.
MEMORY = "8MiB"
NGRAM = {"method": "ngram", "num_speculative_tokens": 12, "prompt_lookup_min": 2, "prompt_lookup_max": 5}
BESIDE: dict[str, dict[str, Any]] = {"plain": {}, "ngram": {"speculative_config": NGRAM}}
GROWTH_MIB = 48


@contextmanager
def measured_engine(**options: Any) -> Iterator[tuple[Any, Callable[[], float]]]:
    """An engine, and how much memory its processes take, in MiB; pages that several of them share count once."""
    import psutil

    this = psutil.Process()
    before = set(this.children(recursive=True))
    with engine(demo_model_path(), num_gpu_blocks_override=3 * WIDTH // 16, **options) as llm:
        ours = [process for process in this.children(recursive=True) if process not in before]
        yield llm.llm_engine, lambda: sum(process.memory_full_info().pss for process in ours) / 2**20


def pool(prompts: Sequence[str], size: int, dice: random.Random) -> list[str]:
    """Prompts of many lengths: single ones, and chains of two or three turns."""
    short = [text for text in prompts if len(text) < 900]
    return [*short[: size // 2], *("".join(dice.sample(short, dice.choice((2, 3)))) for _ in range(size - size // 2))]


class Engine:
    """One of the two engines, and what it has answered."""

    def __init__(self, core: Any) -> None:
        self.core = core
        self.ended: dict[str, Any] = {}

    def step(self) -> None:
        """One engine step, if there is anything to do."""
        for out in self.core.step() if self.core.has_unfinished_requests() else ():
            if out.finished:
                self.ended[out.request_id.split("-")[0]] = out.outputs[0]


def soak(prompts: Sequence[str], minutes: float, drafter: str, beside: str, dice: random.Random) -> dict[str, Any]:
    """Work for so many minutes; returns what happened.

    Raises:
        AssertionError: another reply than the other engine's, or a failure in drafting.
    """
    from vllm import SamplingParams

    counts = dict.fromkeys(("requests", "aborted", "finished", "left the other's reply at a tie"), 0)
    memory: list[tuple[int, float, float]] = []
    options = {"drafter": drafter, "memory": MEMORY, "vllm": {"idle_sequences": 4, "idle_tokens": 4096}}
    with (
        measured_engine(drafting=False, **BESIDE[beside]) as (other_core, other_mib),
        measured_engine(freedraft=options) as (our_core, our_mib),
    ):
        other, ours = Engine(other_core), Engine(our_core)
        live: set[str] = set()
        began = sampled = monotonic()
        draining = False
        while (elapsed := monotonic() - began) < 60 * minutes or live:
            over = elapsed >= 60 * minutes
            if not live:
                draining = False
            arrivals = 0 if over or draining or len(live) > WAITING else dice.choice((0,) * 12 + (1, 1, 2, 8))
            draining = draining or dice.random() < 0.002
            for _ in range(arrivals):
                name, text, length = str(counts["requests"]), dice.choice(prompts), dice.randint(1, LONGEST)
                for one in (other, ours):
                    one.core.add_request(name, text, SamplingParams(temperature=0, max_tokens=length, logprobs=2))
                live.add(name)
                counts["requests"] += 1
            if live and dice.random() < 0.02:
                name = dice.choice(sorted(live))
                for one in (other, ours):
                    one.core.abort_request([name])
                    one.ended.pop(name, None)
                live.remove(name)
                counts["aborted"] += 1
            other.step()
            ours.step()
            for name in other.ended.keys() & ours.ended.keys():
                expected, reply = other.ended.pop(name), ours.ended.pop(name)
                if name not in live:
                    continue
                live.remove(name)
                counts["finished"] += 1
                if list(reply.token_ids) != list(expected.token_ids):
                    assert_same(list(reply.token_ids), expected)
                    counts["left the other's reply at a tie"] += 1
            if monotonic() - sampled > 5:
                sampled = monotonic()
                memory.append((round(sampled - began), other_mib(), our_mib()))
        drafting = totals()
    assert drafting["errors"] == 0, f"{drafting['errors']} failures in drafting"
    grown = []
    for values in ([row[1] for row in memory], [row[2] for row in memory]):
        early, late = values[len(values) // 4 : len(values) // 2], values[-len(values) // 4 :]
        grown.append(statistics.median(late) - statistics.median(early))
    return {
        "minutes": minutes,
        "drafter": drafter,
        "beside": beside,
        **counts,
        "tokens": drafting["tokens"],
        "tokens/step": drafting["tokens"] / drafting["sequence_steps"],
        "errors": drafting["errors"],
        "MiB that the other engine grew by, second quarter to last": round(grown[0], 1),
        "MiB that ours grew by": round(grown[1], 1),
        "seconds, MiB of the other engine, of ours": [
            tuple(map(round, row)) for row in memory[:: max(1, len(memory) // 60)]
        ],
    }


def main() -> None:
    """Parse, run, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20, help="default 20")
    parser.add_argument(
        "--prompts", type=Path, help="folder of JSON lines; default: FREEDRAFT_PROMPTS, or the tests' own"
    )
    parser.add_argument("--pool", type=int, default=48, help="different prompts (default 48)")
    parser.add_argument("--beside", choices=BESIDE, default="ngram", help="the other engine (default ngram)")
    parser.add_argument("--drafter", default="fusion", help="default fusion")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder for the result file")
    given = parser.parse_args()
    dice = random.Random(given.seed)
    prompts = pool(live_prompts(given.prompts), given.pool, dice)
    result = soak(prompts, given.minutes, given.drafter, given.beside, dice)
    print({name: value for name, value in result.items() if not isinstance(value, list)})
    save("vllm_soak", result, given.out)
    other, ours = (
        result[f"MiB that {what}"] for what in ("the other engine grew by, second quarter to last", "ours grew by")
    )
    if ours - other > GROWTH_MIB:
        raise SystemExit(f"memory grew by {ours:.0f} MiB, the other engine's by {other:.0f}")


if __name__ == "__main__":
    main()
