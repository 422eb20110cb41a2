"""What `freedraft replay` was asked for: drafters by configuration, requests from files, and a replay of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from freedraft.integrations.replay.costs import Cost, read_cost
from freedraft.integrations.replay.recorded import Request, Tokenizer
from freedraft.integrations.replay.simulate import Outcome, replay, told_pacer
from freedraft.plugins.config import Config, parse_config
from freedraft.plugins.pacing import compile_kernels, pacer_for
from freedraft.plugins.registry import drafter_class, drafter_from_config
from freedraft.retrieval.errors import InputError


def run(
    config: Config,
    requests: list[Request],
    cost: Cost,
    streams: int,
    padded: bool = False,
    *,
    rehearsing: bool = False,
) -> Outcome:
    """Replay with the drafter that a configuration names, new and unaware of other runs."""
    drafter = drafter_from_config(config, rehearsing=rehearsing)
    pacer = told_pacer(pacer_for(drafter, config.sections.get("pacing", {})), cost)
    return replay(drafter, requests, cost, pacer=pacer, streams=streams, padded=padded)


def rehearse(config: Config, streams: int, padded: bool) -> None:
    """Replay made-up text, so that kernels are compiled, or loaded, before the drafter's time is measured."""
    compile_kernels()
    text = np.tile(np.arange(1, 9, dtype=np.int32), 8)
    run(config, [Request(text, text)] * streams, read_cost("0"), streams, padded, rehearsing=True)


def chosen_configs(drafters: list[str], files: list[Path]) -> dict[str, Config]:
    """The configurations by name: drafters with their defaults, and files; `fusion` where there is none of either."""
    configs = {name: Config(name) for name in drafters}
    for path in files:
        configs[path.stem] = parse_config(path)
    return configs or {"fusion": Config("fusion")}


def with_indexes(configs: dict[str, Config], indexes: Sequence[Path], tokenizer: str | None) -> dict[str, Config]:
    """The configurations with the indexes to draft from, for the drafters that take any.

    One that names an index itself keeps it.

    Args:
        indexes: folders.
        tokenizer: of the model; with it, indexes of another tokenizer are refused when the drafter is made.

    Raises:
        InputError: a drafter needs an index and has none; or there are indexes, and no drafter takes one.
    """
    settings = {name: drafter_class(config.drafter).Settings.model_fields for name, config in configs.items()}
    taking = [name for name, fields in settings.items() if "index" in fields]
    if indexes and not taking:
        raise InputError(f"--index: none of the drafters takes one: {', '.join(configs)}; corpus and fusion do")
    completed = dict(configs)
    for name in taking:
        config = configs[name]
        chosen: dict[str, Any] = {"index": [str(path) for path in indexes]} if indexes else {}
        chosen.update(config.settings)
        if "index" not in chosen:
            if settings[name]["index"].is_required():
                raise InputError(f"{name}: the drafter needs an index to draft from: give --index FOLDER")
            continue
        if tokenizer is not None and "tokenizer" in settings[name]:
            chosen.setdefault("tokenizer", tokenizer)
        completed[name] = replace(config, settings=chosen)
    return completed


def load_tokenizer(name: str | None) -> Tokenizer | None:
    """The tokenizer of a model, by its folder or name; None for None.

    Raises:
        ImportError: transformers is not installed.
        InputError: there is no such tokenizer.
    """
    if name is None:
        return None
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ImportError(f"--tokenizer: {error}; install freedraft[hf]") from error
    try:
        loaded: Tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(f"--tokenizer {name}: {error}") from error
    return loaded


def first_requests(requests: list[Request], limit: int | None) -> list[Request]:
    """The first requests that have about `limit` reply tokens together; None = all."""
    if limit is None:
        return requests
    chosen, total = [], 0
    for request in requests:
        if total >= limit:
            break
        chosen.append(request)
        total += len(request.reply)
    return chosen


COSTS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2)


def speed_up_by_cost(config: Config, requests: list[Request], streams: int, padded: bool) -> dict[float, float]:
    """The predicted speed-up for each of `COSTS`, the cost of one more token as a share of a step."""
    return {share: run(config, requests, read_cost(str(share)), streams, padded).speedup for share in COSTS}
