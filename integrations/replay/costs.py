"""What a step costs: T(n), the time of a step whose forward pass takes n tokens, for simulation."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from freedraft.retrieval.errors import InputError


@dataclass(frozen=True)
class Cost:
    """T(n) in seconds (or any other unit): linear between the points, and beyond the last as between the last two.

    Attributes:
        name: what to call it.
        seconds: n -> T(n), at least at n = 1.
    """

    name: str
    seconds: Mapping[int, float]

    def __call__(self, tokens: int) -> float:
        """T(tokens)."""
        points = sorted(self.seconds)
        if len(points) > 1 and tokens > points[-1]:
            low, high = points[-2:]
            slope = max(0.0, (self.seconds[high] - self.seconds[low]) / (high - low))
            return self.seconds[high] + slope * (tokens - high)
        return float(np.interp(tokens, points, [self.seconds[n] for n in points]))


def linear(share: float) -> Cost:
    """Each token after the first costs `share` of a step."""
    return Cost(f"{share:g} a token", {1: 1.0, 2: 1.0 + share})


# A rule of thumb: a decoding step reads all weights once, whatever the number of tokens, until some 150 of them keep
# the arithmetic units as busy as the memory; a little is added for attention and sampling.
GPU = Cost("gpu", {1: 1.0, 150: 1.3, 300: 2.6})

# Of SmolLM2-135M in float32 on two cores 2 to 16 tokens cost 1.6 to 1.8 times one; what follows is a straight line.
CPU = Cost("cpu", {1: 1.0, 2: 1.6, 16: 1.8, 32: 2.6, 64: 4.2})

SHIPPED = {"gpu": GPU, "cpu": CPU}


def read_cost(given: str) -> Cost:
    """The cost that a user names: `gpu`, `cpu`, a number (the cost of a token, as a share of a step), or a file.

    Raises:
        InputError: neither of these, or a file that `measure-cost` did not write.
    """
    if given in SHIPPED:
        return SHIPPED[given]
    try:
        share = float(given)
    except ValueError:
        return _from_file(Path(given))
    if not 0 <= share <= 100:
        raise InputError(f"--cost {given}: expected 0 to 100, the cost of one more token as a share of a step")
    return linear(share)


def write_cost(path: Path, seconds: Mapping[int, float], about: Mapping[str, Any]) -> None:
    """Write a measured curve, and what it was measured on, to a JSON file."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    content = {**about, "seconds": {str(n): round(value, 7) for n, value in seconds.items()}}
    try:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _from_file(path: Path) -> Cost:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"--cost {path}: expected {', '.join(SHIPPED)}, a number, or a file of measure-cost: {error}"
        ) from error
    except ValueError as error:
        raise InputError(f"--cost {path}: not valid JSON: {error}") from error
    try:
        seconds = {int(n): float(value) for n, value in content["seconds"].items()}
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise InputError(f'--cost {path}: expected {{"seconds": {{"1": T(1), ...}}}}') from error
    if 1 not in seconds or min(seconds) < 1 or not all(0 < value < math.inf for value in seconds.values()):
        raise InputError(f"--cost {path}: seconds: expected T(n) above 0 for n = 1 and others from 1 up")
    return Cost(path.stem, seconds)
