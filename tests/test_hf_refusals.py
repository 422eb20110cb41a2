"""What can't work is refused with an error that says why, and what to do."""

from __future__ import annotations

from typing import Any

import drafters
import pytest
import tiny
import torch
import transformers
from transformers import DynamicCache, StaticCache, cache_utils

from freedraft.integrations.hf import Speculative, refusals
from freedraft.retrieval.errors import FreedraftError, UnsupportedError


def refused(model: Any, match: str, ids: torch.Tensor | None = None, **options: Any) -> None:
    drafter = drafters.never()
    ours = Speculative(drafter)
    with pytest.raises(UnsupportedError, match=match) as caught:
        model.generate(tiny.prompt() if ids is None else ids, custom_generate=ours, max_new_tokens=5, **options)
    assert isinstance(caught.value, FreedraftError)
    # Nothing was begun, so nothing is left open.
    assert drafter.calls == []
    assert ours.statistics is None


def test_beams_which_arrive_as_rows() -> None:
    refused(tiny.model(), "num_beams=3: beam search", num_beams=3)
    refused(tiny.model(), "num_beams=3: beam search", num_beams=3, do_sample=True)


def test_static_caches() -> None:
    refused(tiny.model(), "StaticCache can't take back", cache_implementation="static")
    model = tiny.model()
    refused(model, "StaticCache", past_key_values=StaticCache(config=model.config, max_cache_len=64))


def test_offloaded_caches() -> None:
    model = tiny.model()
    cache = DynamicCache(config=model.config, offloading=True)
    refused(model, "an offloaded cache can't take back", cache_implementation="offloaded")
    refused(model, "an offloaded cache can't take back", past_key_values=cache)


def test_quantised_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    class Quantised(cache_utils.QuantizedLayer):
        """Stands in for those of optimum-quanto and HQQ, which are packages of their own."""

        def __init__(self, *_: Any) -> None:
            super().__init__()

    Quantised.__abstractmethods__ = frozenset()
    monkeypatch.setattr(cache_utils, "QuantoQuantizedLayer", Quantised)
    # transformers 4.57 looks here first.
    monkeypatch.setattr(transformers.generation.utils, "is_optimum_quanto_available", lambda: True, raising=False)
    model = tiny.model()
    refused(model, "QuantizedCache can't take back", cache_implementation="quantized")
    refused(model, "QuantizedCache", past_key_values=cache_utils.QuantizedCache("quanto", model.config))
    cache = DynamicCache(config=model.config)
    cache.layers[-1] = Quantised()
    refused(model, "a quantised cache can't take back", past_key_values=cache)


def test_no_cache() -> None:
    refused(tiny.model(), "use_cache=False", use_cache=False)


def test_recurrent_models() -> None:
    config = transformers.MambaConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4, eos_token_id=None, pad_token_id=2
    )
    refused(transformers.MambaForCausalLM(config).eval(), "MambaForCausalLM keeps a recurrent state")


def test_encoder_decoder_models() -> None:
    config = transformers.T5Config(
        vocab_size=tiny.VOCABULARY, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    refused(transformers.T5ForConditionalGeneration(config).eval(), "encoder-decoder")


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 1}])
def test_another_kind_of_speculation(options: dict[str, Any]) -> None:
    refused(tiny.model(), "another kind of speculation", **options)


@pytest.mark.parametrize(
    "options", [{"penalty_alpha": 0.6, "top_k": 4}, {"dola_layers": "low"}], ids=["contrastive", "dola"]
)
def test_other_modes(options: dict[str, Any]) -> None:
    refused(tiny.model(), "only greedy decoding and sampling can be verified", **options)


def test_ranks_that_must_keep_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import fsdp

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    refusals._check_ranks(tiny.model())
    monkeypatch.setattr(fsdp, "is_fsdp_managed_module", lambda model: True)
    with pytest.raises(UnsupportedError, match="as many forward passes on every rank"):
        refusals._check_ranks(tiny.model())
