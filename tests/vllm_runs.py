"""Real vLLM engines for the tests, on the CPU with the real model in float32."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WIDTH = 512
SPECULATIVE = {
    "method": "custom_class",
    "model": "freedraft.integrations.vllm.Proposer",
    "num_speculative_tokens": 12,
}

CODE = (
    "class Stack:\n"
    "    def __init__(self):\n"
    "        self.items = []\n\n"
    "    def push(self, item):\n"
    "        self.items.append(item)\n\n"
    "    def pop(self):\n"
    "        return self.items.pop()\n\n"
    "    def peek(self):\n"
    "        return self.items[-1]\n\n"
    "    def is_empty(self):\n"
    "        return len(self.items) == 0\n"
)
ARTICLE = (
    "The river Elbe rises in the Giant Mountains of northern Bohemia, flows through Dresden, Magdeburg and Hamburg, "
    "and reaches the North Sea at Cuxhaven after 1,094 kilometres. Its main tributaries are the Vltava, the Saale, "
    "the Havel and the Schwarze Elster. In August 2002 a flood of the Elbe reached 9.40 metres at Dresden, the highest "
    "level ever measured there. The port of Hamburg, 110 kilometres from the mouth, handles more than 100 million "
    "tonnes a year."
)
REQUESTS = [
    # chat
    "Hello! Who are you?",
    "What is the capital of France, and what is it known for?",
    "Explain in two sentences why the sky is blue.",
    "Give me three names for a grey cat.",
    "Is 17 a prime number? Answer and explain.",
    "Write a short poem about rain.",
    # code
    f"Repeat this code exactly:\n```python\n{CODE}```",
    f"Rename the class Stack to Pile in this code and return the whole code:\n```python\n{CODE}```",
    f"Add type hints to this code:\n```python\n{CODE}```",
    "Write a Python function that adds two numbers, and one that subtracts them.",
    "Write a SQL query that counts the orders of each customer.",
    # summaries and questions about a text
    f"Summarize this text in one sentence:\n{ARTICLE}",
    f"{ARTICLE}\n\nHow long is the Elbe?",
    f"{ARTICLE}\n\nList the tributaries of the Elbe.",
    f"Copy the following text word by word:\n{ARTICLE}",
    # JSON and lists
    'Return this as JSON with the keys "name" and "age": Anna is 31 and Ben is 27.',
    '{"items": [{"id": 1, "price": 3}, {"id": 2, "price": 5}]}\nAdd an item with id 3 and price 7 to this JSON.',
    "Count from 1 to 30.",
    "List the days of the week, three times.",
    # other languages
    "Wie heißt die Hauptstadt von Österreich?",
    "Escribe una frase sobre el mar.",
    "Traduis en français : the cat sleeps on the table.",
    "日本の首都はどこですか。",
    "Переведи на русский: good morning.",
]


def prompt(request: str) -> str:
    """The request as the model expects it."""
    return f"<|im_start|>user\n{request}<|im_end|>\n<|im_start|>assistant\n"


def settle_environment() -> None:
    """What an engine of the tests needs in its environment, before vLLM is imported."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


@contextmanager
def engine(model_path: Path, *, drafting: bool = True, freedraft: Any = None, **options: Any) -> Iterator[Any]:
    """A `vllm.LLM` of the test model, ended on leaving."""
    settle_environment()
    from vllm import LLM

    options = {"max_num_seqs": 8, "max_model_len": WIDTH, "dtype": "float32", "enforce_eager": True, **options}
    if drafting:
        options["speculative_config"] = SPECULATIVE
        # What does not pay on a CPU must be right as well.
        given = freedraft or {}
        options["additional_config"] = {"freedraft": given if "config" in given else {"pacing": "off", **given}}
    llm = LLM(model=str(model_path), disable_log_stats=False, **options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def statistics() -> dict[str, float]:
    """The proposer's metrics, summed over all engines of this process."""
    from freedraft.integrations.vllm.metrics import Collector

    totals: dict[str, float] = {}
    for metric in Collector().collect():
        for sample in metric.samples:
            name = sample.name.removeprefix("freedraft:").removesuffix("_total")
            totals[name] = totals.get(name, 0) + sample.value
    return totals


def assert_same(tokens: list[int], plain: Any, tie: float = 1e-3) -> None:
    """`tokens` are those of the plain output, or leave them where its two best logits are within `tie`.

    `plain` is an output with `logprobs=2`. A difference of log-probabilities is one of logits.
    """
    expected = list(plain.token_ids)
    for i, (token, wanted) in enumerate(zip(tokens, expected, strict=False)):
        if token != wanted:
            best = sorted((entry.logprob for entry in plain.logprobs[i].values()), reverse=True)
            margin = best[0] - best[1]
            assert margin < tie, f"token {i} is {token} instead of {wanted}, which is ahead by {margin:.4f}"
            return
    assert len(tokens) == len(expected), f"{len(tokens)} tokens instead of {len(expected)}"
