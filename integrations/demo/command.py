"""`freedraft demo`."""

from __future__ import annotations

import json
import os
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from freedraft.integrations.demo.measure import (
    PLAIN,
    Measured,
    Method,
    greedy,
    measure,
    warm_up,
)
from freedraft.retrieval.errors import InputError

LOOKUP = "transformers prompt lookup"
SHIPPED = ("edit-code", "read-document", "chat")


def demo(
    model: Annotated[
        Path | None, typer.Option(help="Folder of a causal language model. Default: SmolLM2-135M-Instruct.")
    ] = None,
    prompt: Annotated[
        list[Path] | None, typer.Option(help="Text file with a user's message; repeatable. Default: three of ours.")
    ] = None,
    drafter: Annotated[
        list[str] | None, typer.Option(help="Drafter to compare; repeatable. Default: the configured one.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with a drafter and its settings.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate for each input.")] = 128,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each method on each input; medians count.")] = 3,
    show_text: Annotated[bool, typer.Option(help="Print the answers too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list instead of a table.")] = False,
) -> None:
    """Let a chat model answer real inputs: plain, with transformers' own prompt lookup, and with freedraft.

    Greedy decoding in float32. For each, tokens a second, tokens a forward pass, and whether the text is the same.
    """
    notes = Console(stderr=True)
    prompts = _prompts(prompt)
    methods = _methods(drafter or [], config)
    with _doing(notes, "loading the model"):
        language_model, tokenizer = _load(model)
    with _doing(notes, "compiling the kernels: a minute or two the first time, then they are cached"):
        warm_up(language_model, tokenizer, methods.values())
    measured: list[Measured] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), console=notes, disable=not notes.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=len(prompts) * len(methods) * repeats)

        for name, text in prompts.items():
            if not notes.is_terminal:
                _tell(notes, f"{name}: {len(methods) * repeats} runs")

            def step(method: str, name: str = name) -> None:
                bar.update(task, description=escape(f"{name}: {method}"))
                bar.advance(task)

            measured += measure(
                language_model, tokenizer, name, text, methods,
                max_new_tokens=max_new_tokens, repeats=repeats, progress=step,
            )  # fmt: skip
    if as_json:
        typer.echo(json.dumps([one.as_json() for one in measured], indent=1))
        return
    _show(measured, repeats, show_text)


def _doing(notes: Console, what: str) -> AbstractContextManager[object]:
    """Tell what takes its time now: as long as it does on a terminal, else in a line of its own."""
    if notes.is_terminal:
        return notes.status(what)
    _tell(notes, what)
    return nullcontext()


def _tell(notes: Console, what: str) -> None:
    notes.print(f"freedraft demo: {what}", markup=False, emoji=False, highlight=False, soft_wrap=True)


def _prompts(paths: list[Path] | None) -> dict[str, str]:
    if not paths:
        folder = files("freedraft.integrations.demo") / "inputs"
        return {name: (folder / f"{name}.txt").read_text(encoding="utf-8") for name in SHIPPED}
    prompts = {}
    for path in paths:
        try:
            prompts[str(path)] = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--prompt {path}: {error}") from error
        if not prompts[str(path)].strip():
            raise InputError(f"--prompt {path}: the file is empty")
    return prompts


def _methods(drafters: list[str], config: Path | None) -> dict[str, Method]:
    if drafters and config:
        raise InputError("--drafter and --config: give one of them; a configuration names its drafter itself")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        from freedraft.integrations.hf import Speculative
    except ImportError as error:
        raise ImportError(f"{error}; install freedraft[hf]") from error
    # Here, so that a wrong name or setting is told before a model is loaded.
    for name in drafters:
        Speculative(name)
    Speculative(config=config)
    # Ten tokens a draft, as the documentation of transformers shows it.
    methods = {PLAIN: greedy(), LOOKUP: greedy(lambda: {"prompt_lookup_num_tokens": 10})}
    if drafters:
        for name in drafters:
            methods[f"freedraft {name}"] = greedy(partial(_speculating, Speculative, name))
    else:
        methods["freedraft"] = greedy(partial(_speculating, Speculative, None, config))
    return methods


def _speculating(speculative: Any, drafter: str | None, config: Path | None = None) -> dict[str, Any]:
    return {"custom_generate": speculative(drafter, config=config)}


def _load(folder: Path | None) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from freedraft.integrations.hf.smollm2 import demo_model_path

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if folder is not None and not (folder / "config.json").is_file():
        raise InputError(f"--model {folder}: expected a folder with a model's config.json in it")
    path = folder or demo_model_path()
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise InputError(f"--model {path}: not a causal language model that transformers can load: {error}") from error
    # Sampling settings that a chat model brings along would only be warned of at every call.
    model.generation_config.temperature = model.generation_config.top_p = model.generation_config.top_k = None
    return model, tokenizer


def _show(measured: list[Measured], repeats: int, show_text: bool) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    table = Table(caption=f"greedy, float32; medians of {repeats} runs in turns")
    table.add_column("input")
    table.add_column("method")
    for heading in ("tokens", "tokens/s", "tokens/pass", "speed-up"):
        table.add_column(heading, justify="right")
    table.add_column("text")
    last = None
    for one in measured:
        if last not in (None, one.input):
            table.add_section()
        table.add_row(
            Text(one.input if one.input != last else ""),
            Text(one.method),
            str(one.tokens),
            f"{one.tokens_per_second:.1f}",
            f"{one.tokens_per_step:.2f}",
            f"{one.speedup:.2f} x",
            "identical" if one.identical else "[bold red]differs[/]",
        )
        last = one.input
    console.print(table)
    if show_text:
        for one in measured:
            if one.method == PLAIN:
                console.rule(Text(one.input))
                console.print(one.text, markup=False, highlight=False)
    console.print(_summary(measured), markup=False, highlight=False)


def _summary(measured: list[Measured]) -> str:
    ours = [one for one in measured if one.method.startswith("freedraft")]
    same = sum(one.identical for one in ours)
    text = "the same text as plain decoding" if same == len(ours) else f"the same text in {same} of {len(ours)} cases"
    gains = ", ".join(
        f"{one.speedup:.2f} x on {one.input}" + ("" if one.method == "freedraft" else f" ({one.method[10:]})")
        for one in ours
    )
    return f"freedraft gave {text}, at {gains} of its speed."
