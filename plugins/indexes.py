"""The indexes that a drafter's settings name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from freedraft.retrieval.build.tokenize import find_tokenizer
from freedraft.retrieval.index.errors import TokenizerMismatchError
from freedraft.retrieval.index.fingerprint import tokenizer_fingerprint
from freedraft.retrieval.index.segment import Segment
from freedraft.retrieval.index.store import CorpusIndex


def open_segments(index: str | Sequence[str] | None, tokenizer: str | None) -> list[Segment]:
    """Map the segments of an index, or of several.

    Args:
        index: folder or folders; None = none.
        tokenizer: the model's tokenizer.json, the folder that has it, or the model's name, which is looked up in the
            Hugging Face cache. None = the indexes need only agree.

    Raises:
        CorpusIndexError: an index is missing or damaged, or the tokenizer is not to be found.
        TokenizerMismatchError: an index was built with another tokenizer than the model's, or than another index.
    """
    folders = [index] if isinstance(index, str) else index or []
    indexes = [CorpusIndex(Path(folder).expanduser()) for folder in folders]
    _check_tokenizers(indexes, tokenizer)
    return [segment for index in indexes for segment in index.segments]


def _check_tokenizers(indexes: list[CorpusIndex], source: str | None) -> None:
    known = [(index.manifest.tokenizer.name, index.manifest.tokenizer.fingerprint, index.folder) for index in indexes]
    if source is not None:
        name, path = find_tokenizer(source)
        known.insert(0, (name, tokenizer_fingerprint(path), Path("the model")))
    for name, fingerprint, folder in known[1:]:
        if fingerprint != known[0][1]:
            raise TokenizerMismatchError(
                f"{folder}: built with the tokenizer {name}, while {known[0][2]} has {known[0][0]}: another vocabulary "
                "or other merges; build the index with the model's tokenizer"
            )
