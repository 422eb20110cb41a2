"""Prompts for live runs: from a folder of JSON lines, or else the few that the tests use."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from itertools import chain, zip_longest
from pathlib import Path

ENVIRONMENT_VARIABLE = "FREEDRAFT_PROMPTS"


def live_prompts(folder: Path | None = None, *, longest: int = 1 << 30) -> list[str]:
    """Requests in the model's chat format, the categories taking turns.

    Args:
        folder: of `*.jsonl` files whose lines have `turns` (its first is taken) or `prompt`, and perhaps `category`;
            None for what the environment variable FREEDRAFT_PROMPTS names, or else the requests of the tests.
        longest: leave out requests of more characters.

    Raises:
        FileNotFoundError: the folder has no such file.
    """
    sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
    from vllm_runs import REQUESTS, prompt

    if folder is None and os.environ.get(ENVIRONMENT_VARIABLE):
        folder = Path(os.environ[ENVIRONMENT_VARIABLE])
    requests = REQUESTS if folder is None else list(_take_turns(folder))
    return [prompt(request) for request in requests if len(request) <= longest]


def _take_turns(folder: Path) -> Iterator[str]:
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise FileNotFoundError(f"{folder}: expected *.jsonl files of prompts, found none")
    categories: dict[str, list[str]] = {}
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            question = json.loads(line)
            text = question["turns"][0] if "turns" in question else question["prompt"]
            categories.setdefault(question.get("category", ""), []).append(text)
    turns = zip_longest(*categories.values())
    return (text for text in chain.from_iterable(turns) if text is not None)
