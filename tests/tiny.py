"""Tiny random models for the tests of `integrations/hf`: milliseconds a token, float32, sharp distributions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import drafters
import pytest
import torch
import transformers
from transformers import PreTrainedTokenizerFast

from freedraft.integrations.hf import Speculative

VOCABULARY = 200
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    # Far from the usual 0.02: near-ties would make "identical" a matter of the last bit.
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 2,
}

EVERYTHING: dict[str, Any] = {
    "return_dict_in_generate": True,
    "output_scores": True,
    "output_logits": True,
    "output_hidden_states": True,
    "output_attentions": True,
}
"""All that `return_dict_in_generate` can return."""

DRAFTERS: dict[str, Callable[[list[int]], drafters.Scripted]] = {
    "never": lambda text: drafters.never(),
    "truth": drafters.truth,
    "half true": lambda text: drafters.half_true(text, VOCABULARY),
    "noise": lambda text: drafters.noise(VOCABULARY),
    "copying": lambda text: drafters.copying(ngram=1),
}
"""Name -> a drafter, given the text (prompt and output) that the model is going to write."""


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """A second thread only gets in the way of small models, and of the tests in the other process.

    A test module takes this over by its name.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def model(architecture: str = "Llama", **changes: Any) -> Any:
    """The `<architecture>ForCausalLM` with two layers and random weights; do not change it.

    Lists among the `changes` of its configuration are given as tuples, so that one model serves many tests.
    """
    options = {key: list(value) if isinstance(value, tuple) else value for key, value in {**SIZES, **changes}.items()}
    config = getattr(transformers, f"{architecture}Config")(**options)
    torch.manual_seed(17)
    name = f"{architecture.removesuffix('Text')}ForCausalLM"
    return getattr(transformers, name)._from_config(config).eval()


def prompt(length: int = 12, seed: int = 0) -> torch.Tensor:
    """Random token ids int64 `(1, length)`."""
    return torch.randint(3, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed))


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Every token one character, so that any text can be written, and cut, at will."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    characters = "abcdefghijklmnopqrstuvwxyz" + "".join(chr(0x4E00 + i) for i in range(VOCABULARY - 26))
    inner = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token=characters[-1]))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def plain(which: Any, ids: torch.Tensor | None, seed: int = 0, **options: Any) -> Any:
    """What `generate` returns without us."""
    torch.manual_seed(seed)
    return which.generate(ids, **options)


def speculative(which: Any, ids: torch.Tensor | None, ours: Speculative, seed: int = 0, **options: Any) -> Any:
    """What `generate` returns with us."""
    torch.manual_seed(seed)
    return which.generate(ids, custom_generate=ours, **options)


def assert_same(
    which: Any,
    ids: torch.Tensor | None,
    make_drafter: Callable[[list[int]], drafters.Scripted],
    seed: int = 0,
    **options: Any,
) -> Speculative:
    """Plain and speculative `generate` give the same tokens, and leave the random generator in the same state."""
    expected = plain(which, ids, seed, **options)
    state = torch.get_rng_state()
    ours = Speculative(make_drafter(expected[0].tolist()))
    actual = speculative(which, ids, ours, seed, **options)
    assert actual.tolist() == expected.tolist()
    assert torch.equal(torch.get_rng_state(), state)
    assert ours.statistics is not None
    assert ours.statistics.tokens == expected.shape[1] - (0 if ids is None else ids.shape[1])
    assert ours.statistics.drafter_errors == 0
    return ours


def assert_close(actual: Any, expected: Any) -> None:
    """Nested tuples of tensors, alike in structure, shape and value."""
    assert type(actual) is type(expected)
    if isinstance(expected, tuple):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_close(one, other)
    elif expected is not None:
        assert actual.shape == expected.shape
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
