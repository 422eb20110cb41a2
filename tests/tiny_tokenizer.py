"""A tokenizer made on the spot: words, spaces and punctuation, letters for what it has not seen."""

from __future__ import annotations

import json
import string
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "sat",
    "on",
    "mat",
    "def",
    "return",
    "import",
    "self",
    "if",
    "in",
    "for",
    "not",
    "and",
    "or",
    "is",
    "it",
    "of",
    "to",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}{% endfor %}"
)


def make_tokenizer(folder: Path, extra_words: tuple[str, ...] = (), chat: bool = True) -> Path:
    """Write a tokenizer's folder, as transformers would, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    pieces = ["<unk>", *string.printable, *WORDS, *extra_words, "Ġ"]
    merges = []
    for word in (*WORDS, *extra_words):
        for end in range(2, len(word) + 1):
            if word[:end] not in pieces:
                pieces.append(word[:end])
            if (word[: end - 1], word[end - 1]) not in merges:
                merges.append((word[: end - 1], word[end - 1]))
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s|\w+|[^\w\s]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(t) for t in ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": {"content": "<|end|>"}, "model_max_length": 1000}
    if chat:
        config["chat_template"] = CHAT_TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
