"""The text of the index's benchmarks: a trace of chat replies, then files of installed packages, as documents."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from freedraft.integrations.replay.recorded import read_requests
from freedraft.retrieval.build.tokenize import Tokenizer

SUFFIXES = {".py", ".pyi", ".md", ".rst", ".txt"}
LONGEST_FILE = 1 << 20
BATCH_CHARACTERS = 1 << 22
HELD_OUT_EVERY = 20
Tokens = NDArray[np.int32]


@dataclass(frozen=True)
class Corpus:
    """Documents, and text that is not among them.

    Attributes:
        documents: token ids.
        texts: what to tokenise for the same documents.
        chats: how many of the documents, the first ones, are replies; the others are files.
        held_out: by kind, text to follow.
    """

    documents: list[Tokens]
    texts: list[str]
    chats: int
    held_out: dict[str, Tokens]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.documents))

    def first(self, tokens: int) -> Corpus:
        """The documents up to about so many tokens."""
        total = np.cumsum([len(document) for document in self.documents])
        count = int(np.searchsorted(total, tokens)) + 1
        return Corpus(self.documents[:count], self.texts[:count], min(self.chats, count), self.held_out)


def read_corpus(tokens: int, traces: Path | None, tokenizer: Tokenizer, held_out: int) -> Corpus:
    """Read about so many tokens of documents, and `held_out` tokens of each kind beside them.

    Args:
        traces: folder with `corpus_chat.npz` (documents) and `chat.npz` (other conversations, to follow); None = only
            files of packages. One in `HELD_OUT_EVERY` of those is to follow.

    Raises:
        ValueError: there is not so much text.
    """
    documents: list[Tokens] = []
    kept: dict[str, Tokens] = {}
    if traces is not None:
        documents = [request.reply for request in read_requests(traces / "corpus_chat.npz")]
        kept["chat"] = np.concatenate([request.reply for request in read_requests(traces / "chat.npz")])[:held_out]
    texts = [tokenizer.decode(document.tolist()) for document in documents]
    chats = len(documents)
    missing = tokens - sum(map(len, documents))
    aside: list[Tokens] = []
    for number, (text, encoded) in enumerate(_encoded_files(tokenizer)):
        if number % HELD_OUT_EVERY == 0:
            aside.append(encoded)
        elif missing > 0:
            texts.append(text)
            documents.append(encoded)
            missing -= len(encoded)
        if missing <= 0 and sum(map(len, aside)) >= held_out:
            kept["code"] = np.concatenate(aside)[:held_out]
            return Corpus(documents, texts, chats, kept).first(tokens)
    raise ValueError(f"the installed packages have {missing} tokens less than the {tokens} that were asked for")


def _encoded_files(tokenizer: Tokenizer) -> Iterator[tuple[str, Tokens]]:
    folder = Path(sysconfig.get_paths()["purelib"])
    batch: list[str] = []
    for path in sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file()):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if 0 < len(text) <= LONGEST_FILE:
            batch.append(text)
        if sum(map(len, batch)) >= BATCH_CHARACTERS:
            yield from zip(batch, tokenizer.encode(batch), strict=True)
            batch = []
    yield from zip(batch, tokenizer.encode(batch), strict=True)
