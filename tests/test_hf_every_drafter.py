"""Every drafter on the real chat model, alone and in a batch, as chain and tree: the tokens are plain decoding's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from freedraft.integrations.hf import Speculative
from freedraft.plugins.registry import drafter_names
from freedraft.retrieval.build.builder import build_index
from freedraft.retrieval.build.sources import SourceOptions
from freedraft.retrieval.build.tokenize import Tokenizer

# Minutes: every drafter, each four times on a real model, most of them with wide trees.
pytestmark = [pytest.mark.model, pytest.mark.slow]
one_thread = tiny.one_thread

DRAFTERS: dict[str, dict[str, Any]] = {
    "prompt_lookup": {"drafter": "prompt_lookup", "min_match": 1},
    "suffix_automaton": {"drafter": "suffix_automaton", "min_expected": 0},
    "token_recycling": {"drafter": "token_recycling"},
    "token_recycling, chain": {"drafter": "token_recycling", "shape": "chain"},
    "lookahead": {"drafter": "lookahead"},
    "lookahead, chain": {"drafter": "lookahead", "shape": "chain"},
    "jacobi": {"drafter": "jacobi"},
    "jacobi, random": {"drafter": "jacobi", "initial": "random"},
    "fusion": {"drafter": "fusion", "pacing": "off"},
    "fusion, tree": {"drafter": "fusion", "shape": "tree", "pacing": "off"},
    "fusion with recycling": {"drafter": "fusion", "recycling": True, "pacing": "off"},
    "fusion with recycling, tree": {"drafter": "fusion", "recycling": True, "shape": "tree", "pacing": "off"},
    "fusion with everything": {
        "drafter": "fusion",
        "recycling": True,
        "drafters": {"jacobi": {}, "lookahead": {}},
        "pacing": "off",
    },
    "fusion with everything, tree": {
        "drafter": "fusion",
        "recycling": True,
        "drafters": {"jacobi": {}, "lookahead": {}},
        "shape": "tree",
        "pacing": "off",
        "min_probability": 0,
    },
    "fusion with recycling, tree, paced": {"drafter": "fusion", "recycling": True, "shape": "tree"},
    "corpus": {"drafter": "corpus", "min_expected": 0},
    "fusion over an index, tree": {"drafter": "fusion", "index": "", "shape": "tree", "pacing": "off"},
}
QUESTIONS = (
    "Repeat this exactly: one two three four one two three four",
    "Say hello.",
    "Write two lines about rain.",
    "Name two cities as a JSON list of objects with the fields name and country.",
)
NEW = 16
PAD = 2
# Logits this near are a tie, which the width of a pass may decide.
TIE = 1e-3


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def attention(request: Any, model: Any) -> Iterator[str]:
    before = model.config._attn_implementation
    model.set_attn_implementation(request.param)
    yield request.param
    model.set_attn_implementation(before)


@pytest.fixture(scope="module")
def index(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An index of a text that resembles some of the replies, and of one that resembles none."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "counting.txt").write_text("one two three four " * 8)
    (folder / "cities.txt").write_text('[{"name": "Paris", "country": "France"}, {"name": "Rome", "country": "Italy"}]')
    (folder / "hello.txt").write_text("Hello! How can I help you today? Hello! How can I assist you?")
    build_index(folder / "index", [folder], Tokenizer(model_path), SourceOptions(include=("*.txt",)))
    return str(folder / "index")


@pytest.fixture(scope="module", params=[1, len(QUESTIONS)])
def asked(request: Any, attention: str, model: Any, tokenizer: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The prompts, padded on the left, and plain decoding's output."""
    rows = []
    for question in QUESTIONS[: request.param]:
        chat = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        rows.append(tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"][0].flip(0))
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1).flip(1)
    inputs = {"input_ids": torch.where(padded < 0, PAD, padded), "attention_mask": (padded >= 0).long()}
    return inputs, tiny.plain(model, None, **inputs, max_new_tokens=NEW, do_sample=False)


def assert_same_or_tied(
    model: Any, inputs: dict[str, torch.Tensor], actual: torch.Tensor, expected: torch.Tensor
) -> None:
    """The rows are equal, or part where the target's logits of both tokens are within `TIE`."""
    assert actual.shape[0] == expected.shape[0]
    for row, (own, plain) in enumerate(zip(actual.tolist(), expected.tolist(), strict=True)):
        places = [i for i, (one, other) in enumerate(zip(own, plain, strict=False)) if one != other]
        if not places:
            continue
        start = int((1 - inputs["attention_mask"][row]).sum())
        with torch.inference_mode():
            logits = model(expected[row : row + 1, start : places[0]]).logits[0, -1]
        gap = abs(float(logits[own[places[0]]] - logits[plain[places[0]]]))
        assert gap < TIE, f"row {row} leaves plain decoding's at {places[0]}, where the logits are {gap:.4f} apart"


@pytest.mark.parametrize("name", DRAFTERS)
def test_greedy_is_that_of_plain_decoding(name: str, model: Any, asked: Any, index: str) -> None:
    inputs, expected = asked
    config = dict(DRAFTERS[name])
    if name == "corpus" or "index" in config:
        config["index"] = index
    ours = Speculative(config=config)
    actual = tiny.speculative(model, None, ours, **inputs, max_new_tokens=NEW, do_sample=False)
    assert_same_or_tied(model, inputs, actual, expected)
    assert ours.statistics is not None
    assert ours.statistics.drafter_errors == 0
    assert ours.statistics.drafted > 0 or "paced" in name


def test_every_drafter_is_tried() -> None:
    assert {str(config["drafter"]) for config in DRAFTERS.values()} == set(drafter_names())
