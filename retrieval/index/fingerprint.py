"""The fingerprint of a tokenizer: equal for tokenizers that number the same strings, whatever they are called."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

from freedraft.retrieval.index.errors import SourceError

FINGERPRINT_BYTES = 16


def tokenizer_fingerprint(path: str | os.PathLike[str]) -> str:
    """The BLAKE2b-128, in hexadecimal, of a `tokenizer.json`'s vocabulary, merges and added tokens.

    Order and spelling of the file do not matter, nor do names, templates and settings.

    Raises:
        SourceError: not a readable tokenizer.json.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        model = content["model"]
        parts = [
            model.get("type"),
            _vocabulary(model["vocab"]),
            [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges") or []],
            sorted([token["id"], token["content"]] for token in content.get("added_tokens") or []),
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SourceError(f"{path}: expected a tokenizer.json: {type(error).__name__}: {error}") from error
    encoded = json.dumps(parts, ensure_ascii=True, separators=(",", ":")).encode()
    return hashlib.blake2b(encoded, digest_size=FINGERPRINT_BYTES).hexdigest()


def _vocabulary(vocabulary: Any) -> list[Any]:
    # A Unigram model has a list of strings and scores, all others a mapping from strings to ids.
    if isinstance(vocabulary, list):
        return [[i, entry[0]] for i, entry in enumerate(vocabulary)]
    return sorted(zip(vocabulary.values(), vocabulary.keys(), strict=True))
