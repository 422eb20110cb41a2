"""What an index over a package's own source brings live: code edits of that package, in `generate`, on the demo model.

The index is of the installed `rich`, which freedraft's command line uses; each prompt quotes one of its
functions and asks for comments in it. Methods take turns at every prompt; replies are compared with plain's.

    python bench/corpus_live.py [--tokens 96] [--prompts 6] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import inspect
import random
import tempfile
from pathlib import Path
from typing import Any

import generate_live
import rich.columns
import rich.console
import rich.table
import rich.text
import torch
from generate_live import LOOKUP, PLAIN
from harness import RESULTS, markdown, median, save, show
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_runs import prompt

from freedraft.integrations.hf.smollm2 import demo_model_path
from freedraft.retrieval.build.builder import build_index
from freedraft.retrieval.build.sources import SourceOptions
from freedraft.retrieval.build.tokenize import Tokenizer


def prompts(count: int) -> list[str]:
    """Code edits of methods of rich's classes."""
    found = [
        inspect.getsource(method)
        for thing in (rich.table.Table, rich.text.Text, rich.console.Console, rich.columns.Columns)
        for _, method in inspect.getmembers(thing, inspect.isfunction)
        if method.__qualname__.startswith(thing.__name__)
    ]
    code = sorted({text for text in found if 300 < len(text) < 900})
    random.Random(1).shuffle(code)
    return [prompt(f"Add a comment to each line of this code:\n```python\n{text}```") for text in code[:count]]


def main() -> None:
    """Parse, run, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=96, help="tokens of a reply (default 96)")
    parser.add_argument("--prompts", type=int, default=6, help="default 6; two more warm up")
    parser.add_argument("--out", type=Path, help="folder for the result files")
    given = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    with tempfile.TemporaryDirectory() as folder:
        index = Path(folder, "rich.index")
        package = Path(rich.columns.__file__).parent
        build_index(index, [package], Tokenizer(demo_model_path()), SourceOptions(include=("*.py",)))
        corpus = {"index": str(index), "tokenizer": str(demo_model_path())}
        drafters: dict[str, dict[str, Any]] = {
            "suffix_automaton": {"drafter": "suffix_automaton"},
            "corpus": {"drafter": "corpus", **corpus},
            "fusion": {"drafter": "fusion"},
            "fusion with the index": {"drafter": "fusion", **corpus},
        }
        answering = generate_live.methods(model, given.tokens, drafters)
        del answering[LOOKUP]
        measured: dict[str, list[dict[str, Any]]] = {name: [] for name in answering}
        for number, text in enumerate(prompts(2 + given.prompts)):
            inputs = tokenizer(text, return_tensors="pt")
            expected: list[list[int]] = []
            for name, answer in answering.items():
                replies, seconds, steps = answer(inputs)
                expected = expected or replies
                if number >= 2:
                    measured[name].append({"seconds": seconds, "steps": steps, "same": replies == expected})
    table = []
    for name, rows in measured.items():
        ratios = [base["seconds"] / row["seconds"] for base, row in zip(measured[PLAIN], rows, strict=True)]
        table.append(
            {
                "method": name,
                "times plain": median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
                "tokens/step": given.tokens * len(rows) / sum(row["steps"] for row in rows),
                "same replies": f"{sum(row['same'] for row in rows)} of {len(rows)}",
            }
        )
    note = (
        f"SmolLM2-135M-Instruct in float32 on a CPU, greedy, {given.tokens} tokens a reply, {given.prompts} code edits "
        "of methods of rich, whose source the index holds; methods take turns at every prompt. Ratios are medians over "
        "prompts. The code is in the prompt, too, so that `suffix_automaton` has a source as well."
    )
    show("An index of the package", table, note)
    save("corpus_live", {"note": note, "table": table}, given.out)
    page = markdown("An index over a package's source, live", table, note)
    ((given.out or RESULTS) / "corpus_live.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
