"""Tokens a step of the drafters that live on the target's by-products, on a real chat model, beside the others.

Each drafter answers the same prompts in the same order with greedy decoding, and keeps what it has learnt from one to
the next. Every reply is held against plain `generate` before it counts. Pacing is off: this is about guessing well, not
about time.

    python bench/recycling.py --prompts FOLDER [--questions 4] [--tokens 96] [--only NAME ...] [--out FOLDER]

With --only, rows of other drafters are kept that an earlier run on the same questions has written.

FOLDER has `.jsonl` files of Spec-Bench's form: an object a line with `category` and `turns`; the first turn is asked.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, markdown, save, show
from transformers import AutoModelForCausalLM, AutoTokenizer

from freedraft.integrations.hf import Speculative
from freedraft.integrations.hf.smollm2 import demo_model_path
from freedraft.integrations.hf.statistics import Statistics

CHAT = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
KINDS = {
    "chat": CHAT,
    "maths": ("math_reasoning",),
    "questions": ("qa", "rag"),
    "summaries": ("summarization",),
}
CONTENDERS: dict[str, dict[str, Any]] = {
    "token_recycling": {"drafter": "token_recycling"},
    "token_recycling, chain": {"drafter": "token_recycling", "shape": "chain", "max_tokens": 8},
    "token_recycling, rows as in the paper": {
        "drafter": "token_recycling", "context": 1, "fresh": 8, "text": False,
    },
    "lookahead": {"drafter": "lookahead"},
    "lookahead, chain": {"drafter": "lookahead", "shape": "chain"},
    "lookahead, pool from the window only": {"drafter": "lookahead", "text": False},
    "jacobi": {"drafter": "jacobi"},
    "jacobi, initial prompt_lookup": {"drafter": "jacobi", "initial": "prompt_lookup"},
    "prompt_lookup": {"drafter": "prompt_lookup", "min_match": 1},
    "suffix_automaton": {"drafter": "suffix_automaton", "min_expected": 0, "min_probability": 0.1},
    "fusion": {"drafter": "fusion"},
    "fusion with recycling": {"drafter": "fusion", "recycling": True},
    "fusion with jacobi": {"drafter": "fusion", "drafters": {"jacobi": {}}},
    "fusion with lookahead": {"drafter": "fusion", "drafters": {"lookahead": {}}},
    "fusion with recycling, tree": {
        "drafter": "fusion", "recycling": True, "shape": "tree", "max_tokens": 60, "min_probability": 0.002,
    },
    "fusion with all three": {"drafter": "fusion", "recycling": True, "drafters": {"jacobi": {}, "lookahead": {}}},
    "fusion with all three, tree": {
        "drafter": "fusion", "recycling": True, "drafters": {"jacobi": {}, "lookahead": {}}, "shape": "tree",
        "max_tokens": 60, "min_probability": 0.002,
    },
}  # fmt: skip


def questions(folder: Path, each: int) -> list[tuple[str, str]]:
    """`each` questions of every kind, in turns: (kind, question)."""
    by_category = defaultdict(list)
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            item = json.loads(line)
            by_category[item["category"]].append(item["turns"][0])
    chosen: dict[str, list[str]] = {}
    for kind, categories in KINDS.items():
        lists = [by_category[category] for category in categories]
        longest = max(len(found) for found in lists)
        chosen[kind] = [found[i] for i in range(longest) for found in lists if i < len(found)][:each]
    return [(kind, chosen[kind][i]) for i in range(each) for kind in KINDS if i < len(chosen[kind])]


def ask(tokenizer: Any, question: str, longest: int) -> torch.Tensor:
    messages = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids: torch.Tensor = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    return ids[:, -longest:]


def measure(model: Any, replies: list[tuple[str, torch.Tensor, torch.Tensor]], settings: dict[str, Any]) -> Any:
    """Tokens a step by kind and over all, and draft tokens a step."""
    ours = Speculative(config=settings | {"pacing": "off"})
    totals: dict[str, Statistics] = defaultdict(Statistics)
    same = 0

    for kind, prompt, reply in replies:
        options = {"max_new_tokens": reply.shape[1] - prompt.shape[1], "do_sample": False}
        output = model.generate(prompt, attention_mask=torch.ones_like(prompt), custom_generate=ours, **options)
        same += torch.equal(output, reply)
        assert ours.statistics is not None
        totals[kind] += ours.statistics
    every = sum(totals.values(), Statistics())
    if every.drafter_errors:
        raise SystemExit(f"{settings}: {every.drafter_errors} errors of the drafter")
    if same < len(replies):
        raise SystemExit(f"{settings}: {len(replies) - same} of {len(replies)} replies differ from plain generate")
    return {
        **{kind: total.tokens_per_step for kind, total in totals.items()},
        "all": every.tokens_per_step,
        "draft tokens a pass": every.drafted / every.forward_passes,
    }


def _earlier(path: Path, note: str) -> dict[str, dict[str, Any]]:
    """Rows that an earlier run has written, if it asked the same."""
    if not path.exists():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    return {row["drafter"]: row for row in found["results"]} if found["note"] == note else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=Path, default=os.environ.get("FREEDRAFT_PROMPTS"), required=False)
    parser.add_argument("--questions", type=int, default=4, help="of each kind")
    parser.add_argument("--tokens", type=int, default=96, help="of a reply, at most")
    parser.add_argument("--longest", type=int, default=1024, help="tokens of a prompt; of longer ones the end is asked")
    parser.add_argument("--only", nargs="*", default=list(CONTENDERS), choices=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    if chosen.prompts is None or not Path(chosen.prompts).is_dir():
        raise SystemExit("no prompts: give --prompts FOLDER, or set FREEDRAFT_PROMPTS")
    path = demo_model_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    replies = []
    for kind, question in questions(Path(chosen.prompts), chosen.questions):
        prompt = ask(tokenizer, question, chosen.longest)
        options = {"max_new_tokens": chosen.tokens, "do_sample": False}
        replies.append((kind, prompt, model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)))
    note = (
        "Tokens a forward pass, the passes over the prompts included: SmolLM2-135M-Instruct, float32, greedy, batch 1, "
        f"no pacing; {len(replies)} questions, the last {chosen.longest} tokens of a prompt at most, replies of up to "
        f"{chosen.tokens} tokens; one drafter for all of them. Every reply was plain decoding's."
    )
    title = "Drafters on the model's by-products"
    page = (chosen.out or RESULTS) / "recycling.md"
    measured = _earlier(page.with_suffix(".json"), note)
    for name in chosen.only:
        measured[name] = {"drafter": name, **measure(model, replies, CONTENDERS[name])}
        print(measured[name], flush=True)
        rows = [measured[known] for known in CONTENDERS if known in measured]
        # At once, for a run takes long enough to be ended early.
        save("recycling", {"note": note, "results": rows}, chosen.out)
        page.write_text(markdown(title, rows, note), encoding="utf-8")
    show(title, rows, note)
    print("written to", page)


if __name__ == "__main__":
    main()
