"""What an index over a package's own source brings live: code edits of that package, in `generate`, on the demo model.

The index is of the installed `rich`, which freedraft's command line uses; each prompt quotes one of its
functions and asks for comments in it. Methods take turns at every prompt; replies are compared with plain's. CPU time
is told beside the time, for it suffers less from what else runs on the machine.

    python bench/corpus_live.py [--tokens 96] [--prompts 6] [--threads 1] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import inspect
import os
import random
import tempfile
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import rich.columns
import rich.console
import rich.table
import rich.text
import torch
from harness import RESULTS, markdown, median, save, show
from transformers import AutoModelForCausalLM, AutoTokenizer

from freedraft.integrations.hf import Speculative
from freedraft.integrations.hf.smollm2 import demo_model_path
from freedraft.retrieval.build.builder import build_index
from freedraft.retrieval.build.sources import SourceOptions
from freedraft.retrieval.build.tokenize import Tokenizer

PLAIN = "plain"
WARM = 2


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
    return [f"Add a comment to each line of this code:\n```python\n{text}```" for text in code[:count]]


def answer(model: Any, inputs: Any, tokens: int, ours: Speculative | None) -> dict[str, Any]:
    """One reply, what it took, and the steps; `ours` keeps its drafter from call to call, None = plain."""
    options: dict[str, Any] = {} if ours is None else {"custom_generate": ours}
    started, cpu = perf_counter(), process_time()
    output = model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, **options)
    found = {"seconds": perf_counter() - started, "CPU seconds": process_time() - cpu, "steps": tokens}
    if ours is not None:
        assert ours.statistics is not None
        assert ours.statistics.drafter_errors == 0
        found["steps"] = ours.statistics.steps
    return {**found, "reply": output[0, inputs["input_ids"].shape[1] :].tolist()}


def main() -> None:
    """Parse, run, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=96, help="tokens of a reply (default 96)")
    parser.add_argument("--prompts", type=int, default=6, help="default 6; two more warm up")
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    parser.add_argument("--out", type=Path, help="folder for the result files")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    model = AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    with tempfile.TemporaryDirectory() as folder:
        index = Path(folder, "rich.index")
        package = Path(rich.columns.__file__).parent
        build_index(index, [package], Tokenizer(demo_model_path()), SourceOptions(include=("*.py",)))
        corpus = {"index": str(index), "tokenizer": str(demo_model_path())}
        configs: dict[str, dict[str, Any]] = {
            "freedraft suffix_automaton": {"drafter": "suffix_automaton"},
            "freedraft corpus": {"drafter": "corpus", **corpus},
            "freedraft fusion": {"drafter": "fusion"},
            "freedraft fusion with the index": {"drafter": "fusion", **corpus},
        }
        methods = {PLAIN: None} | {name: Speculative(config=config) for name, config in configs.items()}
        measured: dict[str, list[dict[str, Any]]] = {name: [] for name in methods}
        for number, text in enumerate(prompts(WARM + given.prompts)):
            chat = [{"role": "user", "content": text}]
            inputs = tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            for name, ours in methods.items():
                found = answer(model, inputs, given.tokens, ours)
                if number >= WARM:
                    measured[name].append(found)
    load = os.getloadavg()[1]
    table = []
    for name, rows in measured.items():
        ratios, by_cpu = (
            [base[what] / row[what] for base, row in zip(measured[PLAIN], rows, strict=True)]
            for what in ("seconds", "CPU seconds")
        )
        same = sum(row["reply"] == base["reply"] for base, row in zip(measured[PLAIN], rows, strict=True))
        table.append(
            {
                "method": name,
                "times plain": median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
                "times plain by CPU time": median(by_cpu),
                "tokens/step": given.tokens * len(rows) / sum(row["steps"] for row in rows),
                "same replies": f"{same} of {len(rows)}",
            }
        )
    note = (
        f"SmolLM2-135M-Instruct in float32 on a CPU, {torch.get_num_threads()} thread(s), greedy, "
        f"{given.tokens} tokens a reply, {given.prompts} code edits of methods of rich, whose source the index holds; "
        "methods take turns at every prompt. Ratios are medians over prompts. The code is in the prompt, too, so that "
        "`suffix_automaton` and `fusion` have a source as well. Load of the machine, this run included: "
        f"{load:.1f} on {os.cpu_count()} cores."
    )
    show("An index of the package", table, note)
    save("corpus_live", {"note": note, "table": table}, given.out)
    page = markdown("An index over a package's source, live", table, note)
    ((given.out or RESULTS) / "corpus_live.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
