"""What `freedraft replay` was asked for: drafters by configuration, requests from files, and a replay of both."""

from __future__ import annotations

from pathlib import Path

from freedraft.integrations.replay.costs import Cost, read_cost
from freedraft.integrations.replay.recorded import Request, Tokenizer
from freedraft.integrations.replay.simulate import Outcome, replay, told_pacer
from freedraft.plugins.config import Config, parse_config
from freedraft.plugins.pacing import pacer_for
from freedraft.plugins.registry import drafter_from_config
from freedraft.retrieval.errors import InputError


def run(config: Config, requests: list[Request], cost: Cost, streams: int) -> Outcome:
    """Replay with the drafter that a configuration names, new and unaware of other runs."""
    drafter = drafter_from_config(config)
    pacer = told_pacer(pacer_for(drafter, config.sections.get("pacing", {})), cost)
    return replay(drafter, requests, cost, pacer=pacer, streams=streams)


def chosen_configs(drafters: list[str], files: list[Path]) -> dict[str, Config]:
    """The configurations by name: drafters with their defaults, and files; `fusion` where there is none of either."""
    configs = {name: Config(name) for name in drafters}
    for path in files:
        configs[path.stem] = parse_config(path)
    return configs or {"fusion": Config("fusion")}


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


def speed_up_by_cost(config: Config, requests: list[Request], streams: int) -> dict[float, float]:
    """The predicted speed-up for each of `COSTS`, the cost of one more token as a share of a step."""
    return {share: run(config, requests, read_cost(str(share)), streams).speedup for share in COSTS}
