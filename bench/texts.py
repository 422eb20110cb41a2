"""Real text for benchmarks that need no model: the Python standard library's sources, as token ids."""

from __future__ import annotations

import re
import sysconfig
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

WORDS = re.compile(r" ?[A-Za-z]+|\d|\s+|[^\w\s]|_")


@cache
def library_tokens(count: int) -> NDArray[np.int32]:
    """The first `count` tokens of the standard library's modules in order of name; int32.

    Split into words by a regular expression: about as many tokens, and as repetitive, as a model's tokenizer gives.

    Raises:
        ValueError: the library has fewer.
    """
    ids: dict[str, int] = {}
    tokens: list[int] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" in path.parts:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        tokens += [ids.setdefault(word, len(ids)) for word in WORDS.findall(text)]
        if len(tokens) >= count:
            return np.array(tokens[:count], np.int32)
    raise ValueError(f"the standard library has only {len(tokens)} tokens, {count} were asked for")
