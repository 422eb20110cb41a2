"""Three drawings of a replay: speed-up by the cost of a token, calibration, accepted tokens by source."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from freedraft.integrations.replay.simulate import Outcome
from freedraft.retrieval.errors import InputError


def draw(path: Path, outcomes: Mapping[str, Outcome], by_cost: Mapping[str, Mapping[float, float]]) -> None:
    """Write them to `path`, whose suffix names the format.

    Args:
        by_cost: drafter -> cost of one more token, as a share of a step -> speed-up.

    Raises:
        InputError: a format that matplotlib does not know, or a file that can't be written.
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"--plot: {error}; install matplotlib") from error
    figure = Figure(figsize=(13, 4), layout="constrained")
    speed, calibration, sources = figure.subplots(1, 3)
    for name, points in by_cost.items():
        speed.plot(list(points), list(points.values()), marker="o", label=name)
    speed.axhline(1.0, color="grey", linewidth=0.8)
    speed.set(xlabel="cost of one more token, share of a step", ylabel="speed-up", title="Predicted speed-up")
    speed.legend()
    for name, outcome in outcomes.items():
        rows = [(right / count, total / count) for count, right, total in outcome.calibration.tolist() if count]
        calibration.plot([predicted for _, predicted in rows], [seen for seen, _ in rows], marker="o", label=name)
    calibration.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    calibration.set(xlabel="predicted probability", ylabel="share that was right", title="Calibration")
    named = [source for source in _sources(outcomes) if any(o.sources[source].accepted for o in outcomes.values())]
    below = [0.0] * len(outcomes)
    for source in named:
        accepted = [float(outcome.sources[source].accepted) for outcome in outcomes.values()]
        sources.bar(list(outcomes), accepted, bottom=below, label=source.replace("_", " "))
        below = [low + high for low, high in zip(below, accepted, strict=True)]
    sources.set(ylabel="tokens", title="Accepted tokens by source")
    if named:
        sources.legend()
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise InputError(f"--plot {path}: {error}") from error


def _sources(outcomes: Mapping[str, Outcome]) -> list[str]:
    return list(dict.fromkeys(source for outcome in outcomes.values() for source in outcome.sources))
