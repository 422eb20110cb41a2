"""Prompts for live runs, by task: chat, code edits, questions on a document, JSON.

Which ones are drawn changes with every change of these lists; results keep the prompts of their time.

The code and the documents are functions of the Python standard library and what is written about them there.
"""

from __future__ import annotations

import calendar
import colorsys
import difflib
import fractions
import heapq
import inspect
import logging
import pathlib
import random
import shlex
import statistics
import textwrap
import threading
import zipfile
from collections.abc import Iterable, Sequence
from types import ModuleType

MODULES: tuple[ModuleType, ...] = (
    textwrap,
    statistics,
    heapq,
    shlex,
    calendar,
    colorsys,
    difflib,
    fractions,
    random,
    logging,
    pathlib,
    threading,
    zipfile,
)

CHAT = (
    "Explain how a bicycle stays upright while it moves.",
    "What should I pack for three days of hiking in the mountains?",
    "Write a short letter to a neighbour who plays loud music at night.",
    "Why is the sky red at sunset?",
    "Give me five ideas for a birthday party of ten-year-old children.",
    "What is the difference between a virus and a bacterium?",
    "How do I keep basil alive in a pot on the window sill?",
    "Tell a story about a lighthouse keeper who finds a bottle.",
    "What are the advantages and disadvantages of working at home?",
    "How does a refrigerator make things cold?",
    "Suggest a plan for learning to play the guitar in six months.",
    "What happened in the first years of the railway?",
    "Describe the taste of a ripe mango to someone who never had one.",
    "How do I ask my manager for a higher salary?",
    "Why do cats purr?",
    "Name the steps of making bread with sourdough.",
    "What is inflation, and who loses by it?",
    "Write a poem about the last day of summer.",
    "How can a small town attract more visitors?",
    "What makes a good photograph?",
    "Compare tea and coffee.",
    "How should I prepare for a job interview?",
    "What is a black hole?",
    "Describe a normal day of a beekeeper.",
    "How do I remove a stain of red wine from a carpet?",
    "What did people eat in ancient Rome?",
    "Explain to a child why the moon changes its shape.",
    "Which exercises help against pain in the lower back?",
    "Write a speech of one minute for the wedding of a friend.",
    "How does a bank earn money?",
    "What should I know before I adopt a dog?",
    "Describe the view from a mountain at dawn.",
    "How do vaccines work?",
    "Give me a plan for a weekend in Lisbon.",
    "Why do leaves change their colour in autumn?",
    "What are the rules of chess for a beginner?",
    "Write an apology to a customer whose parcel was lost.",
    "How can I sleep better?",
    "What is the difference between weather and climate?",
    "Tell a joke about a programmer and explain it.",
    "How do I grow tomatoes on a balcony?",
    "Who invented the telephone, and how did it change life?",
    "What makes a team work well together?",
    "Explain compound interest with an example.",
    "How do bees find their way home?",
    "Suggest three recipes with lentils.",
    "Why do we dream?",
    "Write a short biography of an invented explorer.",
)
EDITS = (
    "Add type hints to this function and change nothing else",
    "Rename the first parameter of this function to `value`",
    "Add a line to this function that prints its name first",
    "Remove the comments from this function",
)
QUESTIONS = (
    "What does this text say about the return value? Quote the sentences",
    "Summarize this text in three sentences",
    "Which names are mentioned in this text? List each with what the text says of it",
)
RECORDS = (
    "invoices",
    "flights",
    "books",
    "sensors",
    "recipes",
    "patients",
    "songs",
    "orders",
    "employees",
    "films",
    "hotels",
    "plants",
    "machines",
    "students",
    "museums",
    "parcels",
)


def tasks(count: int, seed: int = 0) -> dict[str, list[str]]:
    """Task -> `count` different requests.

    Raises:
        ValueError: more than there are.
    """
    dice = random.Random(seed)
    functions = [text for text in _functions() if 200 < len(text) < 900]
    documents = [text for text in _documents() if 300 < len(text) < 1200]
    found = {
        "chat": list(CHAT),
        "code edit": [f"{dice.choice(EDITS)}:\n\n```python\n{text}```" for text in functions],
        "document question": [f"{text}\n\n{dice.choice(QUESTIONS)}." for text in documents],
        "JSON": [
            f"Write {n} invented {what} as a JSON list of objects. Each has the fields {', '.join(fields)}."
            for what in RECORDS
            for n, fields in (
                (3, ("id", "name", "date", "price")),
                (4, ("number", "city", "country", "open")),
                (5, ("key", "title", "year", "tags")),
            )
        ],
    }
    for name, requests in found.items():
        dice.shuffle(requests)
        if len(requests) < count:
            raise ValueError(f"{name}: there are {len(requests)} requests, not {count}")
    return {name: requests[:count] for name, requests in found.items()}


def _functions() -> Sequence[str]:
    return _each_once(
        textwrap.dedent(inspect.getsource(function))
        for module in MODULES
        for _, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__
    )


def _documents() -> Sequence[str]:
    return _each_once(
        inspect.cleandoc(thing.__doc__)
        for module in MODULES
        for _, thing in inspect.getmembers(module, lambda thing: inspect.isfunction(thing) or inspect.isclass(thing))
        if thing.__module__ == module.__name__ and thing.__doc__
    )


def _each_once(texts: Iterable[str]) -> Sequence[str]:
    """In their order; a module may have two names for the same."""
    return list(dict.fromkeys(texts))
