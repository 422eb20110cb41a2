"""Let a real vLLM engine with freedraft work for long: random arrivals, aborts and lengths, and too small a KV cache.

Each reply is compared with that of an engine without drafts: the same, or another from a token on where the two best
ones are within 1e-3. The engine's memory must not grow, and nothing may fail.

    python bench/vllm_soak.py [--minutes 20] [--prompts FOLDER] [--drafter NAME] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import statistics
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
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

LONGEST = 96
WAITING = 40
# Little, so that it is full, and pages of it are used again, long before the end.
MEMORY = "48MiB"
GROWTH_MIB = 48


def resident_mib() -> float:
    """Resident memory of this process and its engine's, in MiB."""
    import psutil

    this = psutil.Process()
    return sum(process.memory_info().rss for process in (this, *this.children(recursive=True))) / 2**20


def pool(prompts: Sequence[str], size: int, dice: random.Random) -> list[str]:
    """Prompts of many lengths: single ones, and chains of two or three turns."""
    short = [text for text in prompts if len(text) < 900]
    return [*short[: size // 2], *("".join(dice.sample(short, dice.choice((2, 3)))) for _ in range(size - size // 2))]


def plain_replies(prompts: Sequence[str], pipe: Connection) -> None:
    """Send the plain engine's replies with the two best log-probabilities of each token."""
    from vllm import SamplingParams

    from freedraft.integrations.hf.smollm2 import demo_model_path

    with engine(demo_model_path(), drafting=False) as llm:
        greedy = SamplingParams(temperature=0, max_tokens=LONGEST, logprobs=2)
        pipe.send([out.outputs[0] for out in llm.generate(list(prompts), greedy, use_tqdm=False)])


def soak(
    prompts: Sequence[str], plain: Sequence[Any], minutes: float, drafter: str, dice: random.Random
) -> dict[str, Any]:
    """Work for so many minutes; returns what happened.

    Raises:
        AssertionError: another reply than plain's, a failure in drafting, or memory that grows.
    """
    from vllm import SamplingParams

    from freedraft.integrations.hf.smollm2 import demo_model_path

    counts = dict.fromkeys(("requests", "aborted", "finished", "left plain's reply at a tie"), 0)
    memory: list[tuple[float, float]] = []
    options = {"drafter": drafter, "memory": MEMORY, "vllm": {"idle_sequences": 4, "idle_tokens": 4096}}
    with engine(demo_model_path(), freedraft=options, num_gpu_blocks_override=3 * WIDTH // 16) as llm:
        core = llm.llm_engine
        live: dict[str, tuple[int, int]] = {}
        began = sampled = monotonic()
        draining = False
        while (elapsed := monotonic() - began) < 60 * minutes or live:
            over = elapsed >= 60 * minutes
            if not live:
                draining = False
            arrivals = 0 if over or draining or len(live) > WAITING else dice.choice((0,) * 12 + (1, 1, 2, 8))
            draining = draining or dice.random() < 0.002
            for _ in range(arrivals):
                which, length = dice.randrange(len(prompts)), dice.randint(1, LONGEST)
                name = str(counts["requests"])
                core.add_request(name, prompts[which], SamplingParams(temperature=0, max_tokens=length))
                live[name] = which, length
                counts["requests"] += 1
            if live and dice.random() < 0.02:
                name = dice.choice(list(live))
                core.abort_request([name])
                del live[name]
                counts["aborted"] += 1
            for out in core.step() if core.has_unfinished_requests() else ():
                name = out.request_id.split("-")[0]
                if not out.finished or name not in live:
                    continue
                which, length = live.pop(name)
                tokens = list(out.outputs[0].token_ids)
                expected = list(plain[which].token_ids)[:length]
                if tokens != expected:
                    assert_same(tokens, _shortened(plain[which], length))
                    counts["left plain's reply at a tie"] += 1
                counts["finished"] += 1
            if monotonic() - sampled > 5:
                sampled = monotonic()
                memory.append((round(sampled - began), resident_mib()))
        metrics = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
        drafting = totals()
    assert drafting["errors"] == 0, f"{drafting['errors']} failures in drafting"
    values = [mib for _, mib in memory]
    early, late = (
        statistics.median(part) for part in (values[len(values) // 4 : len(values) // 2], values[-len(values) // 4 :])
    )
    print("MiB:", [round(mib) for mib in values[:: max(1, len(values) // 40)]])
    assert late - early < GROWTH_MIB, f"memory grew from {early:.0f} to {late:.0f} MiB"
    return {
        "minutes": minutes,
        "drafter": drafter,
        **counts,
        "preemptions": metrics["vllm:num_preemptions"],
        "tokens": drafting["tokens"],
        "tokens/step": drafting["tokens"] / drafting["sequence_steps"],
        "errors": drafting["errors"],
        "MiB in the second quarter": early,
        "MiB in the last quarter": late,
        "MiB": [(seconds, round(mib, 1)) for seconds, mib in memory[:: max(1, len(memory) // 60)]],
    }


def _shortened(reply: Any, length: int) -> Any:
    from types import SimpleNamespace

    return SimpleNamespace(token_ids=list(reply.token_ids)[:length], logprobs=reply.logprobs[:length])


def main() -> None:
    """Parse, run, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20, help="default 20")
    parser.add_argument(
        "--prompts", type=Path, help="folder of JSON lines; default: FREEDRAFT_PROMPTS, or the tests' own"
    )
    parser.add_argument("--pool", type=int, default=48, help="different prompts (default 48)")
    parser.add_argument("--drafter", default="fusion", help="default fusion")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder for the result file")
    given = parser.parse_args()
    dice = random.Random(given.seed)
    prompts = pool(live_prompts(given.prompts), given.pool, dice)
    spawn = multiprocessing.get_context("spawn")
    pipe, other = spawn.Pipe()
    process = spawn.Process(target=plain_replies, args=(prompts, other))
    process.start()
    other.close()
    plain = pipe.recv()
    process.join()
    print(f"{len(plain)} plain replies; {given.minutes} minutes begin", flush=True)
    result = soak(prompts, plain, given.minutes, given.drafter, dice)
    print({name: value for name, value in result.items() if name != "MiB"})
    save("vllm_soak", result, given.out)


if __name__ == "__main__":
    main()
