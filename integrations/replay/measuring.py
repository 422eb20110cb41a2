"""`freedraft measure-cost`: T(n) of a model on this machine, for `freedraft replay`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from freedraft.integrations.replay.costs import write_cost
from freedraft.retrieval.errors import InputError

WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)


def measure_cost(
    model: Annotated[Path, typer.Option(help="Folder of a causal language model.")],
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("cost.json"),
    context: Annotated[int, typer.Option(min=1, help="Tokens before the measured ones.")] = 512,
    max_tokens: Annotated[int, typer.Option(min=1, help="The widest forward pass to measure.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Passes of each width; medians count.")] = 15,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="Where the model runs, as torch names it.")] = "cpu",
) -> None:
    """Measure what a forward pass costs, by the number of tokens that it verifies, and write the curve to a file.

    The passes run through transformers; another runtime, such as vLLM, has another curve.
    """
    loaded = _load(model, dtype, device)
    widths = [width for width in WIDTHS if width <= max_tokens]
    seconds = measure(loaded, context, widths, repeats)
    about = {"model": str(model), "context": context, "dtype": dtype, "device": device, "repeats": repeats}
    try:
        write_cost(out, seconds, about)
    except OSError as error:
        raise InputError(f"--out {out}: {error}") from error
    table = Table()
    for column in ("tokens", "ms", "x one token"):
        table.add_column(column, justify="right")
    for width, value in seconds.items():
        table.add_row(str(width), f"{1e3 * value:.2f}", f"{value / seconds[1]:.2f}")
    console = Console()
    console.print(f"{model.name or model}: a forward pass after {context} tokens", highlight=False, soft_wrap=True)
    console.print(table)
    console.print(f"written to {out}", highlight=False, soft_wrap=True)


def measure(model: Any, context: int, widths: Sequence[int], repeats: int) -> dict[int, float]:
    """Median seconds of a forward pass by its width; the widths take turns, so that a busy machine is so for all.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        context: tokens in the cache.
        widths: positive, with 1 among them.
        repeats: passes of each.
    """
    import torch

    vocabulary = int(model.config.get_text_config().vocab_size)
    ids = torch.arange(context + max(widths), device=model.device)[None] % vocabulary
    taken: dict[int, list[float]] = {width: [] for width in widths}
    with torch.inference_mode():
        cache = model(ids[:, :context], use_cache=True, logits_to_keep=1).past_key_values
        for repeat in range(repeats + 1):
            for width in widths:
                _finish(torch, model)
                started = perf_counter()
                logits = model(ids[:, context : context + width], past_key_values=cache, use_cache=True).logits
                logits.argmax(dim=-1).cpu()
                if repeat:  # the first round warms up
                    taken[width].append(perf_counter() - started)
                cache.crop(-width)
    return {width: statistics.median(values) for width, values in taken.items()}


def _finish(torch: Any, model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def _load(path: Path, dtype: str, device: str) -> Any:
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise ImportError(f"{error}; install freedraft[hf]") from error
    if dtype not in ("float32", "bfloat16", "float16"):
        raise InputError(f"--dtype {dtype}: expected float32, bfloat16 or float16")
    if not path.is_dir():
        raise InputError(f"--model {path}: expected the folder of a model")
    try:
        return AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).to(device).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"--model {path}: {error}") from error
