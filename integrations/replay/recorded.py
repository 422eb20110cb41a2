"""Recorded requests: a prompt and its reply as token ids, from token traces, texts or chats."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from freedraft.retrieval.errors import InputError
from freedraft.retrieval.ragged import Int32, as_tokens

REPLY_KEYS = ("reply", "response", "completion", "output")
ROW = "one of: prompt_ids and reply_ids (token ids), prompt and reply (texts), messages (a chat)"


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """A prompt and its reply; int32 `(n,)` each."""

    prompt: Int32
    reply: Int32


class Tokenizer(Protocol):
    """What is asked of a tokenizer; those of transformers have it."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        """Token ids of a text, under `input_ids`."""

    def apply_chat_template(
        self, conversation: list[dict[str, Any]], *, add_generation_prompt: bool, tokenize: bool
    ) -> Any:
        """The text of a conversation."""


def read_requests(path: Path, tokenizer: Tokenizer | None = None) -> list[Request]:
    """Read all requests of a file that have a reply.

    Args:
        path: a token trace (`.npz` with `tok` and `seq`), or JSON lines, each with `prompt_ids` and `reply_ids`, with
            `prompt` and `reply` texts, or with the `messages` of a chat, in which every answer of the assistant is a
            reply to all before it.
        tokenizer: for texts and chats.

    Raises:
        InputError: unreadable, not of this form, or text without a tokenizer; the message names the line.
    """
    found = list(_traces(path) if path.suffix == ".npz" else _lines(path, tokenizer))
    requests = [request for request in found if len(request.reply)]
    if not requests:
        raise InputError(f"{path}: no request with a reply in it")
    return requests


def _traces(path: Path) -> Iterator[Request]:
    try:
        with np.load(path, allow_pickle=False) as stored:
            tokens, rows = as_tokens(stored["tok"], "tok"), np.asarray(stored["seq"])
    except (OSError, ValueError, KeyError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not a token trace: {error}") from error
    if rows.ndim != 2 or rows.shape[1] < 3 or rows.dtype.kind not in "iu":
        raise InputError(f"{path}: seq: expected integers (requests, 3 or more), got {rows.dtype} {rows.shape}")
    for i, (start, middle, end) in enumerate(rows[:, :3].tolist()):
        if not 0 <= start <= middle <= end <= len(tokens):
            raise InputError(f"{path}: seq: row {i} is {start}, {middle}, {end} of {len(tokens)} tokens")
        yield Request(tokens[start:middle], tokens[middle:end])


def _lines(path: Path, tokenizer: Tokenizer | None) -> Iterator[Request]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield from _row(line, tokenizer, f"{path}:{number}")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {error}") from error


def _row(line: str, tokenizer: Tokenizer | None, where: str) -> Iterator[Request]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected an object with {ROW}")
    if "prompt_ids" in row and "reply_ids" in row:
        try:
            prompt, reply = (as_tokens(row[key], key) for key in ("prompt_ids", "reply_ids"))
        except (InputError, ValueError) as error:
            raise InputError(f"{where}: {error}") from error
        if min(prompt.min(initial=0), reply.min(initial=0)) < 0:
            raise InputError(f"{where}: token ids must not be negative")
        yield Request(prompt, reply)
        return
    texts = _texts(row, where)
    if tokenizer is None:
        raise InputError(f"{where}: texts need the model's tokenizer: give --tokenizer")
    if texts is not None:
        yield Request(_ids(tokenizer, texts[0], True), _ids(tokenizer, texts[1], False))
        return
    yield from _chat(row["messages"], tokenizer, where)


def _texts(row: Mapping[str, Any], where: str) -> tuple[str, str] | None:
    if isinstance(row.get("messages"), list):
        return None
    reply = next((row[key] for key in REPLY_KEYS if isinstance(row.get(key), str)), None)
    if not isinstance(row.get("prompt"), str) or reply is None:
        raise InputError(f"{where}: expected {ROW}; got {', '.join(map(str, row)) or 'nothing'}")
    return row["prompt"], reply


def _chat(messages: list[Any], tokenizer: Tokenizer, where: str) -> Iterator[Request]:
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InputError(f"{where}: messages: item {i}: expected an object with role and content")
        if message["role"] != "assistant" or not isinstance(message.get("content"), str):
            continue
        try:
            before = tokenizer.apply_chat_template(messages[:i], add_generation_prompt=True, tokenize=False)
            after = tokenizer.apply_chat_template(messages[: i + 1], add_generation_prompt=False, tokenize=False)
        except Exception as error:  # templates raise what they like
            raise InputError(f"{where}: messages: the tokenizer's chat template refuses them: {error}") from error
        # Some templates change earlier turns once an answer is there; then the answer alone has to do.
        reply = after[len(before) :] if after.startswith(before) else message["content"]
        yield Request(_ids(tokenizer, before, False), _ids(tokenizer, reply, False))


def _ids(tokenizer: Tokenizer, text: str, special: bool) -> Int32:
    return as_tokens(np.array(tokenizer(text, add_special_tokens=special)["input_ids"], np.int64), "input_ids")
