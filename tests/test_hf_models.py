"""Architectures and caches: sliding windows, learned positions, caches in use, what can't be rolled back."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import transformers
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from freedraft.integrations.hf import Speculative
from freedraft.integrations.hf.cache import Rollback, prepare_cache
from freedraft.retrieval.errors import UnsupportedError

one_thread = tiny.one_thread

RECORDS_PAST = hasattr(DynamicSlidingWindowLayer, "activate_past_recording")
WINDOW = 8
SLIDING: dict[str, dict[str, Any]] = {
    "Mistral": {"sliding_window": WINDOW},
    "Gemma2": {"sliding_window": WINDOW, "num_hidden_layers": 4},
    "Gemma3Text": {"sliding_window": WINDOW, "num_hidden_layers": 4, "sliding_window_pattern": 2},
    "Qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
}


@pytest.mark.parametrize("name", tiny.DRAFTERS)
@pytest.mark.parametrize("architecture", SLIDING)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("length", [3, WINDOW - 1, WINDOW, 30])
def test_windows_shorter_than_the_text(name: str, architecture: str, attention: str, length: int) -> None:
    model = tiny.model(architecture, attn_implementation=attention, **SLIDING[architecture])
    tiny.assert_same(model, tiny.prompt(length), tiny.DRAFTERS[name], max_new_tokens=30)


@pytest.mark.parametrize("architecture", SLIDING)
def test_these_models_slide(architecture: str) -> None:
    # Otherwise the test above would show nothing.
    model = tiny.model(architecture, **SLIDING[architecture])
    cache = DynamicCache(config=model.config)
    assert WINDOW in [getattr(layer, "sliding_window", None) for layer in cache.layers]


@pytest.mark.parametrize("architecture", SLIDING)
def test_windows_with_left_padding_and_sampling(architecture: str) -> None:
    model = tiny.model(architecture, **SLIDING[architecture])
    ids = torch.cat([torch.full((1, 3), 2), tiny.prompt(12)], dim=1)
    mask = (torch.arange(15) >= 3).long()[None]
    for name in ("truth", "half true", "noise"):
        tiny.assert_same(
            model, ids, tiny.DRAFTERS[name], attention_mask=mask, max_new_tokens=25, do_sample=True, temperature=4.0
        )


@pytest.mark.parametrize("architecture", SLIDING)
def test_a_long_draft_beyond_the_window(architecture: str) -> None:
    model = tiny.model(architecture, **SLIDING[architecture])
    ours = tiny.assert_same(model, tiny.prompt(12), tiny.DRAFTERS["truth"], max_new_tokens=60)
    assert ours.statistics is not None
    assert ours.statistics.forward_passes == 2


@pytest.mark.parametrize("architecture", ["Qwen2", "Qwen3", "Phi3", "GPTNeoX", "Olmo2"])
def test_other_architectures(architecture: str) -> None:
    for name in ("truth", "half true", "noise"):
        tiny.assert_same(tiny.model(architecture), tiny.prompt(9), tiny.DRAFTERS[name], max_new_tokens=30)


def test_learned_positions_up_to_the_last_one() -> None:
    config = transformers.GPT2Config(
        vocab_size=tiny.VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=40, initializer_range=0.2,
        bos_token_id=0, eos_token_id=None, pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(3)
    model = transformers.GPT2LMHeadModel(config).eval()
    for name in tiny.DRAFTERS:
        # A draft past the table of positions would be an IndexError.
        tiny.assert_same(model, tiny.prompt(9), tiny.DRAFTERS[name], max_length=40)


def test_token_type_ids() -> None:
    config = transformers.GPT2Config(
        vocab_size=tiny.VOCABULARY, n_embd=64, n_layer=2, n_head=4, initializer_range=0.2, eos_token_id=None
    )
    torch.manual_seed(3)
    model = transformers.GPT2LMHeadModel(config).eval()
    types = torch.tensor([[5] * 4 + [6] * 5])
    ours = tiny.assert_same(model, tiny.prompt(9), tiny.DRAFTERS["truth"], token_type_ids=types, max_new_tokens=30)
    assert ours.statistics is not None
    assert ours.statistics.forward_passes == 2


@pytest.mark.parametrize("name", tiny.DRAFTERS)
def test_a_cache_in_use(name: str) -> None:
    model = tiny.model()
    first, ids = tiny.prompt(12, seed=1), tiny.prompt(20, seed=1)
    assert first.equal(ids[:, :12])
    cache = model(first[:, :-1], use_cache=True).past_key_values
    tiny.plain(model, ids, past_key_values=cache, max_new_tokens=1)
    expected = tiny.plain(model, ids, max_new_tokens=30)
    cache = model(first, use_cache=True).past_key_values
    ours = Speculative(tiny.DRAFTERS[name](expected[0].tolist()))
    actual = tiny.speculative(model, ids, ours, past_key_values=cache, max_new_tokens=30)
    assert actual.equal(expected)
    assert cache.get_seq_length() == 49


def test_a_sliding_cache_of_the_users_own() -> None:
    model = tiny.model("Mistral", **SLIDING["Mistral"])
    text = tiny.plain(model, tiny.prompt(12), max_new_tokens=30)
    ours = Speculative(tiny.DRAFTERS["half true"](text[0].tolist()))
    cache = DynamicCache(config=model.config)
    tiny.speculative(model, text[:, :12], ours, past_key_values=cache, max_new_tokens=10)
    assert cache.get_seq_length() == 21
    # Handed back as it came: a cache that goes on recording grows without bound.
    assert not any(getattr(layer, "record_past", False) for layer in cache.layers)
    mask = torch.ones(1, 22, dtype=torch.long)
    again = tiny.speculative(model, text[:, :22], ours, attention_mask=mask, past_key_values=cache, max_new_tokens=20)
    assert again.equal(text)
    assert cache.get_seq_length() == 41


def test_before_transformers_5_sliding_layers_are_replaced_while_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(DynamicSlidingWindowLayer, "activate_past_recording", raising=False)
    model = tiny.model("Gemma2", **SLIDING["Gemma2"])
    cache = DynamicCache(config=model.config)
    assert prepare_cache(cache) == [WINDOW, None, WINDOW, None]
    assert [type(layer) for layer in cache.layers] == [DynamicLayer] * 4
    in_use = model(tiny.prompt(12), use_cache=True, past_key_values=DynamicCache(config=model.config)).past_key_values
    with pytest.raises(UnsupportedError, match="transformers 5"):
        prepare_cache(in_use)


def test_short_convolutions_can_be_rolled_back() -> None:
    model = tiny.model("Lfm2", layer_types=("conv", "full_attention") * 2, num_hidden_layers=4)
    if not RECORDS_PAST:
        # Before transformers 5 this model had a cache of its own.
        with pytest.raises(UnsupportedError, match="a cache of its own"):
            tiny.speculative(model, tiny.prompt(), Speculative(tiny.DRAFTERS["never"]([])), max_new_tokens=5)
        return
    for name in ("truth", "half true", "noise"):
        tiny.assert_same(model, tiny.prompt(9), tiny.DRAFTERS[name], max_new_tokens=30)


def test_a_recurrent_state_found_after_the_prompt_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="recurrent state"):
        Rollback(SimpleNamespace(is_croppable=False, layers=[]))


def test_unknown_layers_are_not_taken_for_croppable() -> None:
    class Strange(DynamicLayer):
        pass

    with pytest.raises(UnsupportedError, match="can't be cropped"):
        Rollback(SimpleNamespace(layers=[DynamicLayer(), Strange()]))


@pytest.mark.parametrize("cropped", [0, 1, 5])
def test_rollback_drops_the_newest(cropped: int) -> None:
    cache = DynamicCache()
    keys = torch.arange(24.0).reshape(1, 1, 12, 2)
    cache.update(keys, keys + 100, 0)
    Rollback(cache).drop(cropped)
    assert cache.layers[0].keys.equal(keys[:, :, : 12 - cropped])
    assert cache.layers[0].values.equal(keys[:, :, : 12 - cropped] + 100)


def test_windows_of_the_layers() -> None:
    model = tiny.model("Gemma2", **SLIDING["Gemma2"])
    assert prepare_cache(DynamicCache(config=model.config)) == [WINDOW, None, WINDOW, None]
    assert prepare_cache(DynamicCache()) == []
