"""Decode with `generate` and the demo model: plain, transformers' prompt lookup, and freedraft's drafters.

All methods answer the same prompts of four tasks, one prompt after the other, taking turns, so that noise hits them
alike. Each drafter object was warmed up with prompts of each task that are not measured: kernels, and what pacing and
the mixer learn. Replies are compared with plain's.

    python bench/generate_live.py [--tokens 48] [--prompts 2] [--only METHOD ...] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

import torch
from harness import RESULTS, markdown, median, save, show
from tasks import tasks
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_runs import prompt

from freedraft.integrations.hf import Speculative
from freedraft.integrations.hf.smollm2 import demo_model_path

BATCH = 4
PLAIN = "plain"
LOOKUP = "transformers prompt lookup"
DRAFTERS: dict[str, dict[str, Any]] = {
    "prompt_lookup": {"drafter": "prompt_lookup"},
    "suffix_automaton": {"drafter": "suffix_automaton"},
    "token_recycling": {"drafter": "token_recycling"},
    "lookahead": {"drafter": "lookahead"},
    "jacobi": {"drafter": "jacobi"},
    "fusion": {"drafter": "fusion"},
    "fusion with recycling": {"drafter": "fusion", "recycling": True},
    "fusion with recycling, trees": {"drafter": "fusion", "recycling": True, "shape": "tree"},
    "fusion, unpaced": {"drafter": "fusion", "pacing": "off"},
    "fusion with recycling, unpaced": {"drafter": "fusion", "recycling": True, "pacing": "off"},
}
Answer = tuple[list[list[int]], float, int]
"""Replies, seconds, and a sequence's steps in all; 0 steps = not known."""


def methods(model: Any, tokens: int, drafters: Mapping[str, Mapping[str, Any]]) -> dict[str, Callable[[Any], Answer]]:
    """Name -> one that answers a batch of inputs; each keeps its drafter, and `drafters` has its configuration."""

    def generate(inputs: Any, **options: Any) -> tuple[list[list[int]], float]:
        started = perf_counter()
        output = model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, **options)
        seconds = perf_counter() - started
        return output[:, inputs["input_ids"].shape[1] :].tolist(), seconds

    def speculating(ours: Speculative) -> Callable[[Any], Answer]:
        def answer(inputs: Any) -> Answer:
            replies, seconds = generate(inputs, custom_generate=ours)
            assert ours.statistics is not None
            assert ours.statistics.drafter_errors == 0
            return replies, seconds, ours.statistics.steps

        return answer

    found: dict[str, Callable[[Any], Answer]] = {
        PLAIN: lambda inputs: (*generate(inputs), tokens * len(inputs["input_ids"])),
        LOOKUP: lambda inputs: (*generate(inputs, prompt_lookup_num_tokens=10), 0),
    }
    return found | {
        f"freedraft {name}": speculating(Speculative(config=dict(config))) for name, config in drafters.items()
    }


def main() -> None:
    """Parse, run, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=48, help="tokens of a reply (default 48)")
    parser.add_argument("--prompts", type=int, default=2, help="single prompts a task (default 2); and a batch of 4")
    parser.add_argument("--warm", type=int, default=1, help="prompts a task to warm up with (default 1)")
    parser.add_argument("--only", nargs="+", help="methods, beside plain")
    parser.add_argument("--out", type=Path, help="folder for the result files")
    given = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path(), padding_side="left")
    answering = methods(model, given.tokens, DRAFTERS)
    if given.only:
        answering = {name: one for name, one in answering.items() if name == PLAIN or name in given.only}
    measured: dict[tuple[int, str, str], list[dict[str, Any]]] = {}
    for task, texts in tasks(given.warm + given.prompts + BATCH).items():
        chats = [prompt(text) for text in texts]
        warm, single, batch = chats[: given.warm], chats[given.warm : -BATCH], chats[-BATCH:]
        for answer in answering.values():
            for text in warm:
                answer(tokenizer(text, return_tensors="pt"))
        print(f"{task}: warm", flush=True)
        for texts_at_once in [*([text] for text in single), batch]:
            inputs = tokenizer(texts_at_once, return_tensors="pt", padding=True)
            count = len(texts_at_once)
            expected: list[list[int]] = []
            for name, answer in answering.items():
                if name == LOOKUP and count > 1:
                    continue  # transformers refuses batches
                replies, seconds, steps = answer(inputs)
                expected = expected or replies
                rows = measured.setdefault((count, task, name), [])
                same = sum(reply == other for reply, other in zip(replies, expected, strict=True))
                rows.append({"seconds": seconds, "steps": steps, "same": same})
    table = []
    for (count, task, name), rows in sorted(measured.items(), key=lambda item: item[0][0]):
        plain = measured[count, task, PLAIN]
        ratios = [base["seconds"] / row["seconds"] for base, row in zip(plain, rows, strict=True)]
        total = given.tokens * count * len(rows)
        steps = sum(row["steps"] for row in rows)
        table.append(
            {
                "batch": count,
                "task": task,
                "method": name,
                "tokens/s": median([given.tokens * count / row["seconds"] for row in rows]),
                "times plain": median(ratios),
                "lowest": min(ratios),
                "tokens/step": total / steps if steps else "",
                "same replies": f"{sum(row['same'] for row in rows)} of {count * len(rows)}",
            }
        )
    note = (
        f"SmolLM2-135M-Instruct in float32 on a CPU, greedy, {given.tokens} tokens a reply: {given.prompts} prompts of "
        f"each task alone, and {BATCH} in one batch. Methods take turns at every prompt. Ratios are medians over "
        "prompts. Speeds are from end to end, the pass over the prompt included. A step is a forward pass of a "
        "sequence. Replies that are not plain's left it where the two best tokens are nearly equal."
    )
    show("Live decoding in generate", table, note)
    save("generate_live", {"note": note, "table": table}, given.out)
    page = markdown("Live decoding in generate", table, note)
    ((given.out or RESULTS) / "generate_live.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
