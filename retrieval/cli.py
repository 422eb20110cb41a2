"""`freedraft index`: build a retrieval index, change it, look into it."""

from __future__ import annotations

import inspect
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich import filesize
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from freedraft.retrieval.build.builder import (
    BuildOptions,
    BuildReport,
    append_to_index,
    build_index,
    tokenizer_of_index,
)
from freedraft.retrieval.build.display import ProgressBar, TokenBar
from freedraft.retrieval.build.limits import parse_size, segment_tokens
from freedraft.retrieval.build.sources import Format, SourceOptions
from freedraft.retrieval.build.tokenize import Tokenizer
from freedraft.retrieval.errors import InputError
from freedraft.retrieval.index.errors import CorpusIndexError, NotFoundError, SourceError
from freedraft.retrieval.index.manifest import Reading, read_manifest
from freedraft.retrieval.index.store import CorpusIndex, delete_documents, merge_segments
from freedraft.retrieval.query import OCCURRENCES_LOOKED_AT, Follower, documents_with, likeliest_draft
from freedraft.retrieval.ragged import Int32, as_tokens

Command = TypeVar("Command", bound=Callable[..., None])

index_app = typer.Typer(
    help="Build and look into retrieval indexes: text to draft from, on disk.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _command(function: Command) -> Command:
    """Add a subcommand whose help is its docstring, with each paragraph's lines joined: terminals differ in width."""
    paragraphs = inspect.getdoc(function).split("\n\n")  # type: ignore[union-attr]
    index_app.command(help="\n\n".join(" ".join(paragraph.split("\n")) for paragraph in paragraphs))(function)
    return function


class Chat(StrEnum):
    """Which part of a chat to index."""

    REPLIES = "replies"
    ALL = "all"


Index = Annotated[Path, typer.Argument(metavar="INDEX", help="Folder of the index.", show_default=False)]
SourcePaths = Annotated[
    list[str],
    typer.Argument(metavar="SOURCE", help="Files and folders; - is standard input.", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
FormatOption = Annotated[
    Format, typer.Option("--format", help="What the files hold; auto goes by their names.", rich_help_panel="Input")
]
Field = Annotated[
    str,
    typer.Option(
        help="Field of JSON lines or Parquet with the text, the messages or the token ids; a.b.0 looks into it.",
        rich_help_panel="Input",
    ),
]
ChatOption = Annotated[
    Chat,
    typer.Option(
        help="Of messages, index the assistant's replies, or all as the tokenizer's chat template renders it.",
        rich_help_panel="Input",
    ),
]
Include = Annotated[
    list[str] | None,
    typer.Option(help="Of folders, only files like this, as in a .gitignore; repeatable.", rich_help_panel="Input"),
]
Exclude = Annotated[
    list[str] | None, typer.Option(help="Of folders, no files like this; repeatable.", rich_help_panel="Input")
]
Strict = Annotated[
    bool,
    typer.Option("--strict", help="Stop at the first bad line or file; else skip and count.", rich_help_panel="Input"),
]
MaxMemory = Annotated[
    str,
    typer.Option(help="Memory of the whole command; with --ray, of each task.", rich_help_panel="Resources"),
]
Workers = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Processes that build segments; with --ray, tasks at a time. Default: 1; with --ray, the cluster's CPUs.",
        show_default=False,
        rich_help_panel="Resources",
    ),
]
Ray = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Build on this Ray cluster: auto, host:port or ray://host:port.",
        show_default=False,
        rich_help_panel="Resources",
    ),
]


@_command
def build(
    index: Index,
    sources: SourcePaths,
    tokenizer: Annotated[
        str,
        typer.Option(
            help="The model's tokenizer: a folder, a tokenizer.json, or a model's name in the Hugging Face cache.",
            show_default=False,
        ),
    ],
    form: FormatOption = Format.AUTO,
    field: Field = "text",
    chat: ChatOption = Chat.REPLIES,
    include: Include = None,
    exclude: Exclude = None,
    strict: Strict = False,
    dedup: Annotated[
        bool, typer.Option("--dedup", help="Leave out documents that were there already, exactly.")
    ] = False,
    min_count: Annotated[
        int,
        typer.Option(
            min=1, max=2**32 - 1, help="Keep only continuations seen this often in a segment; 2 about halves an index."
        ),
    ] = 1,
    replace: Annotated[bool, typer.Option("--replace", help="Replace the index if there is one.")] = False,
    max_memory: MaxMemory = "4GiB",
    workers: Workers = None,
    ray: Ray = None,
    as_json: AsJson = False,
) -> None:
    """Build an index from texts, code, chats or tokens.

    Files are read by their names: .jsonl and .parquet as records (--field), .npy as token ids, all others as UTF-8
    text; gzip and zstd are unpacked on the way. A folder stands for the files in it that git would not ignore.
    Each file, and each record, is a document, named by its path, or path:line.

    Until the build is done, an older index in INDEX stays as it is; so it does if the build is stopped.

    Examples:

        freedraft index build code.index ~/project --tokenizer ~/models/llama --include '*.py'

        freedraft index build chats.index logs/*.jsonl.gz --field messages --tokenizer org/model --dedup

        zcat huge.txt.gz | freedraft index build text.index - --tokenizer tokenizer.json
    """
    report = _run(
        lambda bar: build_index(
            index,
            sources,
            Tokenizer(tokenizer),
            SourceOptions(form, field, chat.value, include or (), exclude or ()),
            BuildOptions(parse_size(max_memory), workers, ray, strict),
            min_count=min_count,
            dedup=dedup,
            overwrite=replace,
            report=bar.show,
        )
    )
    _show_report(report, index, f"built {index}", as_json)


@_command
def append(
    index: Index,
    sources: SourcePaths,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Where the index's tokenizer is now, if not where it was at the build.", show_default=False),
    ] = None,
    form: FormatOption = Format.AUTO,
    field: Field = "text",
    chat: ChatOption = Chat.REPLIES,
    include: Include = None,
    exclude: Exclude = None,
    strict: Strict = False,
    max_memory: MaxMemory = "4GiB",
    workers: Workers = None,
    ray: Ray = None,
    as_json: AsJson = False,
) -> None:
    """Add documents to an index.

    They become new segments; when there are too many, segments are merged. --dedup and --min-count are those of
    the build. The sources are read as build reads them, by the options given here: where those of the build were
    others, a line says so.
    """
    options = SourceOptions(form, field, chat.value, include or (), exclude or ())
    _tell_other_reading(read_manifest(index).reading, options.recorded())
    report = _run(
        lambda bar: append_to_index(
            index,
            sources,
            tokenizer,
            options,
            BuildOptions(parse_size(max_memory), workers, ray, strict),
            report=bar.show,
        )
    )
    _show_report(report, index, f"added to {index}", as_json)


@_command
def merge(index: Index, max_memory: MaxMemory = "4GiB", as_json: AsJson = False) -> None:
    """Merge all segments into as few as possible.

    Following a text costs time for each segment; append merges by itself when there are too many. A segment is not
    made larger than can be built in the memory given.
    """
    limit = segment_tokens(parse_size(max_memory), 0)
    before = _describe(CorpusIndex(index))
    with _token_bar("merging") as bar:
        merge_segments(index, limit, bar.show)
    _show_change(f"merged {index}", before, _describe(CorpusIndex(index)), as_json)


@_command
def delete(
    index: Index,
    document: Annotated[
        list[str],
        typer.Option(help="Name of the documents to delete, as query and info --documents show it; repeatable."),
    ],
    max_memory: MaxMemory = "4GiB",
    as_json: AsJson = False,
) -> None:
    """Delete documents by name, from answers and from disk.

    The segments that hold them are written anew without them. A process that has the index open keeps the old ones
    until it opens it again. A long file, or a chat, is several documents of one name: all of them go. A segment that
    is too large to be built in the memory given becomes several; merge with more memory joins them again.
    """
    limit = segment_tokens(parse_size(max_memory), 0)
    opened = CorpusIndex(index)
    # As they are listed, a name's control characters are escaped.
    listed = {_printable(name): name for name in _names(opened)}
    known = set(listed.values())
    unknown = [name for name in document if name not in known and name not in listed]
    if unknown:
        raise InputError(f"{unknown[0]}: no document of that name in {index}; info --documents lists them")
    before = _describe(opened)
    with _token_bar("writing anew what holds them") as bar:
        delete_documents(index, [name if name in known else listed[name] for name in document], limit, bar.show)
    _show_change(f"deleted from {index}", before, _describe(CorpusIndex(index)), as_json)


@_command
def info(
    index: Index,
    documents: Annotated[bool, typer.Option("--documents", help="List the documents' names instead.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what an index holds: tokenizer, counts, sizes, sources, segments."""
    opened = CorpusIndex(index)
    if documents:
        names = _names(opened)
        typer.echo(json.dumps(names, indent=1) if as_json else "\n".join(map(_printable, names)))
        return
    described = _describe(opened)
    if as_json:
        typer.echo(json.dumps(described, indent=1))
        return
    tokenizer = described["tokenizer"]
    read_with = _as_options(opened.manifest.reading)
    rows = {
        "index": str(index),
        "tokenizer": f"{tokenizer['name']} ({tokenizer['vocabulary_size']:,} tokens)",
        "fingerprint": tokenizer["fingerprint"],
        "content": _summary(described),
        "options": f"--min-count {described['min_count']}" + (" --dedup" if described["dedup"] else ""),
        **({"read with": " ".join(filter(None, read_with.values()))} if read_with else {}),
        "sources": "\n".join(described["sources"]),
    }
    width = max(map(len, rows))
    for key, value in rows.items():
        for i, line in enumerate(value.split("\n")):
            typer.echo(f"{'' if i else key:<{width}}  {_printable(line)}")


@_command
def verify(index: Index, as_json: AsJson = False) -> None:
    """Check every checksum and the whole structure of an index; exit status 1 if anything is wrong.

    Reads all of it. What opening an index checks by itself is less: enough never to read outside its files.
    """
    try:
        opened = CorpusIndex(index)
        with _token_bar("checking") as bar:
            opened.verify(bar.show)
    except CorpusIndexError as error:
        if as_json and not isinstance(error, NotFoundError):
            typer.echo(json.dumps({"sound": False, "error": type(error).__name__, "finding": str(error)}))
        raise
    described = _describe(opened)
    if as_json:
        typer.echo(json.dumps({"sound": True, "segments": described["segments"], "bytes": described["bytes"]}))
    else:
        typer.echo(f"{index} is sound: {_summary(described)}")


@_command
def query(
    index: Index,
    text: Annotated[str, typer.Argument(help="What was written so far; - is standard input.", show_default=False)],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to draft.")] = 8,
    top: Annotated[int, typer.Option(min=1, help="Continuations and documents to list.")] = 5,
    ids: Annotated[bool, typer.Option("--ids", help="TEXT is token ids, separated by spaces or commas.")] = False,
    tokenizer: Annotated[
        str | None, typer.Option(help="Where the index's tokenizer is now, if it has moved.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what would be drafted after TEXT, and why.

    The longest end of TEXT that the index knows; what followed it, how often; the draft, with the context that each
    token comes from; and the documents with the context that the draft starts from, which need not be the longest end
    that is known: then the documents with that one follow. The draft is that of the drafter `corpus` but for its
    thresholds: that one ends a draft sooner where it gets unlikely, and makes none that promises too little.
    """
    opened = CorpusIndex(index)
    if text == "-":
        text = sys.stdin.read()
    try:
        known_by = tokenizer_of_index(opened.manifest, tokenizer)
    except SourceError:
        # Ids need none; they are then shown without their text.
        if not ids or tokenizer:
            raise
        known_by = None
    written = _ids(text) if ids or known_by is None else known_by.encode([_utf8(text)])[0]
    answer = _answer(opened, written, tokens, top, known_by)
    if as_json:
        typer.echo(json.dumps(answer, indent=1))
    else:
        _show_answer(answer)


def _answer(opened: CorpusIndex, written: Int32, budget: int, top: int, tokenizer: Tokenizer | None) -> dict[str, Any]:
    def text_of(tokens: Sequence[int]) -> str | None:
        return tokenizer.decode(tokens) if tokenizer is not None else None

    segments = opened.segments
    follower = Follower(segments)
    follower.advance(written)
    known = follower.continuation()
    drafted = likeliest_draft(segments, written, budget)

    def end_of_text(tokens: int) -> tuple[dict[str, Any], dict[str, Any]]:
        context = written[len(written) - tokens :]
        found, all_of_them = documents_with(segments, context) if tokens else ([], True)
        listed = {
            "documents": [{"name": name, "count": count} for name, count in found[:top]],
            "documents_in_all": len(found),
            "documents_are_all": all_of_them,
        }
        return {"tokens": tokens, "text": text_of(context.tolist())}, listed

    match, with_match = end_of_text(known.length)
    start, with_start = match, with_match
    if drafted and drafted[0].length != known.length:
        start, with_start = end_of_text(drafted[0].length)
    return {
        "tokens": len(written),
        "match": {**match, "count": known.count, **with_match},
        "continuations": [
            {"token": token, "text": text_of([token]), "count": times, "share": times / known.count}
            for token, times in known.tokens[:top]
        ],
        "draft": [
            {
                "token": one.token,
                "text": text_of([one.token]),
                "context": one.length,
                "count": one.times,
                "of": one.count,
                "probability": one.probability,
            }
            for one in drafted
        ],
        "draft_text": text_of([one.token for one in drafted]),
        "start": start,
        **with_start,
    }


def _show_answer(answer: dict[str, Any]) -> None:
    console = _stdout()
    match = answer["match"]
    if not match["tokens"]:
        console.print(f"The index knows no end of these {answer['tokens']} tokens: nothing would be drafted.")
        return
    console.print(
        f"match: the last {match['tokens']} of {answer['tokens']} tokens, seen {_times(match['count'])}: "
        f"{_quoted(match['text'])}",
        markup=False,
    )
    console.print(f"draft: {_quoted(answer['draft_text'])}", markup=False)
    table = Table(title="the draft, token by token", title_justify="left")
    for heading in ("token", "text"):
        table.add_column(heading)
    for heading in ("context", "count", "probability"):
        table.add_column(heading, justify="right")
    for one in answer["draft"]:
        table.add_row(
            str(one["token"]),
            escape(_quoted(one["text"])),
            f"{one['context']} tokens",
            f"{one['count']} of {one['of']}",
            f"{one['probability']:.3f}",
        )
    console.print(table)
    table = Table(title="what followed the match", title_justify="left")
    table.add_column("token")
    table.add_column("text")
    table.add_column("count", justify="right")
    table.add_column("share", justify="right")
    for one in answer["continuations"]:
        table.add_row(str(one["token"]), escape(_quoted(one["text"])), str(one["count"]), f"{one['share']:.3f}")
    console.print(table)
    start = answer["start"]
    if start["tokens"] == match["tokens"]:
        _show_documents(console, "documents with the match", answer)
        return
    tokens = _counted(start["tokens"], "token")
    context = f"documents with the last {tokens}, which the draft starts from: {_quoted(start['text'])}"
    _show_documents(console, context, answer)
    _show_documents(console, "documents with the match, which is longer", match)


def _show_documents(console: Console, what: str, listed: dict[str, Any]) -> None:
    first = "" if listed["documents_are_all"] else f", of its first {OCCURRENCES_LOOKED_AT:,} places in each segment"
    console.print(f"{what}{first}:", markup=False, soft_wrap=True)
    for one in listed["documents"]:
        console.print(f"  {_printable(one['name'])} ({_times(one['count'])})", markup=False, soft_wrap=True)
    more = listed["documents_in_all"] - len(listed["documents"])
    if more:
        console.print(f"  and {more} more")


def _names(opened: CorpusIndex) -> list[str]:
    return [name for segment in opened.segments for name in segment.names()]


def _describe(opened: CorpusIndex) -> dict[str, Any]:
    manifest = opened.manifest
    return {
        "tokenizer": {
            "name": manifest.tokenizer.name,
            "fingerprint": manifest.tokenizer.fingerprint,
            "vocabulary_size": manifest.tokenizer.vocabulary_size,
        },
        "documents": sum(len(segment) for segment in opened.segments),
        "tokens": sum(segment.tokens for segment in opened.segments),
        "segments": len(opened.segments),
        "bytes": sum(segment.header.file_size for segment in opened.segments),
        "min_count": manifest.min_count,
        "dedup": manifest.dedup,
        "sources": list(manifest.sources),
        "reading": asdict(manifest.reading) if manifest.reading is not None else None,
    }


def _as_options(reading: Reading | None) -> dict[str, str]:
    """The options of the command line that these are, by field; no pattern is an empty text."""
    if reading is None:
        return {}
    options = {name: f"--{name} {shlex.quote(getattr(reading, name))}" for name in ("format", "field", "chat")}
    for name in ("include", "exclude"):
        options[name] = " ".join(f"--{name} {shlex.quote(pattern)}" for pattern in getattr(reading, name))
    return options


def _tell_other_reading(built: Reading | None, given: Reading) -> None:
    """Say on stderr which of the build's options are not those of an append."""
    now = _as_options(given)
    others = {name: option for name, option in _as_options(built).items() if option != now[name]}
    if others:
        were, are = (", ".join(options[name] or f"no --{name}" for name in others) for options in (others, now))
        typer.echo(_printable(f"the index was built with {were}; this append reads with {are}"), err=True)


def _ids(text: str) -> Int32:
    try:
        return as_tokens([int(part) for part in text.replace(",", " ").split()])
    except ValueError as error:
        raise InputError(f"--ids: expected token ids, got {text!r}") from error


def _utf8(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"TEXT: not UTF-8, at character {error.start}") from error
    return text


def _printable(text: str) -> str:
    """What a document is called, without control characters: a terminal would obey them."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _run(work: Callable[[ProgressBar], BuildReport]) -> BuildReport:
    with ProgressBar(Console(stderr=True)) as bar:
        return work(bar)


def _token_bar(what: str) -> TokenBar:
    return TokenBar(Console(stderr=True), what)


def _show_report(report: BuildReport, folder: Path, done: str, as_json: bool) -> None:
    opened = _describe(CorpusIndex(folder))
    if as_json:
        added = {
            "documents": report.documents,
            "tokens": report.tokens,
            "duplicates": report.duplicates,
            "seconds": round(report.seconds, 3),
            "problems": report.problems.as_json(),
            "merge_failure": report.merge_failure,
        }
        typer.echo(json.dumps({"added": added, "index": opened}, indent=1))
        return
    for line in report.problems.lines():
        typer.echo(line, err=True)
    if report.merge_failure:
        typer.echo(f"added, but its segments could not be merged: {report.merge_failure}", err=True)
    duplicates = f", {report.duplicates:,} duplicates left out" if report.duplicates else ""
    rate = report.tokens / report.seconds if report.seconds else 0.0
    typer.echo(
        f"{done}: {report.documents:,} documents, {report.tokens:,} tokens{duplicates}, "
        f"in {report.seconds:.1f} s ({rate:,.0f} tokens/s)"
    )
    typer.echo(f"the index: {_summary(opened)}")


def _show_change(done: str, before: dict[str, Any], after: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"before": before, "after": after}, indent=1))
    else:
        typer.echo(f"{done}: {_summary(before)} before, {_summary(after)} now")


def _summary(described: dict[str, Any]) -> str:
    a_token = described["bytes"] / max(1, described["tokens"])
    segments = _counted(described["segments"], "segment")
    return (
        f"{described['documents']:,} documents, {described['tokens']:,} tokens, {segments}, "
        f"{_bytes(described['bytes'])} ({a_token:.1f} a token)"
    )


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _bytes(number: int) -> str:
    return filesize.decimal(number)


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number:,} times"


def _quoted(text: str | None) -> str:
    return "" if text is None else json.dumps(text, ensure_ascii=False)


def _stdout() -> Console:
    # Where nobody looks at a terminal, lines are not to be wrapped.
    return Console() if sys.stdout.isatty() else Console(width=160)
