"""A model's tokenizer, without the model: from a folder, a `tokenizer.json` or a model's name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from freedraft.retrieval.build.chat import ChatTemplate, load_chat_template
from freedraft.retrieval.build.extras import require
from freedraft.retrieval.index.errors import SourceError
from freedraft.retrieval.ragged import Int32

FILE = "tokenizer.json"
COMPANIONS = ("tokenizer_config.json", "chat_template.jinja")


class Tokenizer:
    """Encodes texts in batches, and decodes tokens.

    Args:
        source: a folder with a `tokenizer.json`, such a file, or a model's name (`organisation/model`), which is looked
            up in the Hugging Face cache; nothing is fetched.

    Attributes:
        path: of the `tokenizer.json`.
        name: what to call it in the manifest: the model's name, or the absolute path that was given.

    Raises:
        SourceError: it cannot be found or read.
        MissingPackageError: tokenizers or huggingface_hub is not installed.
    """

    def __init__(self, source: str | os.PathLike[str]) -> None:
        tokenizers = require("tokenizers", "tokenising text")
        self.name, self.path = find_tokenizer(source)
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_file(str(self.path))
        # The library raises plain Exception.
        except Exception as error:
            raise SourceError(f"{self.path}: not a tokenizer that the tokenizers library can read: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    @cached_property
    def vocabulary_size(self) -> int:
        """Token ids are below it."""
        return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    def encode(self, texts: Sequence[str]) -> list[Int32]:
        """The tokens of each text, int32 `(t,)`: none added at its ends, special tokens written out in it recognised.

        Uses as many threads as `RAYON_NUM_THREADS` says, all cores by default.
        """
        batch = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in batch]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones shown."""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=False)
        return text

    def chat_template(self) -> ChatTemplate:
        """The chat template that lies beside it.

        Raises:
            SourceError: there is none, or it is not valid.
        """
        return load_chat_template(self.path.parent)


def find_tokenizer(source: str | os.PathLike[str]) -> tuple[str, Path]:
    """What to call a tokenizer, and where its `tokenizer.json` is; as `Tokenizer` takes it, without reading it.

    Raises:
        SourceError: it cannot be found.
        MissingPackageError: it is a model's name, and huggingface_hub is not installed.
    """
    given = os.path.expanduser(os.fspath(source))
    if not os.path.exists(given):
        return os.fspath(source), _from_cache(os.fspath(source))
    path = Path(given) / FILE if os.path.isdir(given) else Path(given)
    if not path.is_file():
        raise SourceError(
            f"{given}: no {FILE} in this folder; transformers writes one: "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    return os.path.abspath(given), path


def _from_cache(name: str) -> Path:
    hub = require("huggingface_hub", f"finding the tokenizer {name!r} by its name")
    try:
        return Path(hub.hf_hub_download(name, FILE, local_files_only=True))
    # OSError: not in the cache. ValueError: not even a name.
    except (OSError, ValueError) as error:
        raise SourceError(
            f"tokenizer {name!r}: neither a folder nor a file, and the Hugging Face cache has no model of that name: "
            f"give the folder of the model, or fetch it first: hf download {name} {FILE} {' '.join(COMPANIONS)}"
        ) from error
