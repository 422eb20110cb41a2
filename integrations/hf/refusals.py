"""What can't be decoded speculatively, found before any work is done."""

from __future__ import annotations

from typing import Any

import torch
from transformers.generation import GenerationMode

from freedraft.retrieval.errors import InputError, UnsupportedError


def check_request(model: Any, input_ids: torch.Tensor, generation_config: Any, model_kwargs: dict[str, Any]) -> None:
    """Refuse what would give a wrong result, hang, or fail later with a message that does not help.

    Raises:
        UnsupportedError: why it can't work, and what to do.
        InputError: an empty prompt.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedError(
            f"{type(model).__name__} is an encoder-decoder model; only decoder-only models are supported"
        )
    # Beams arrive as rows; they must not be mistaken for a batch of prompts.
    if (beams := generation_config.num_beams or 1) > 1:
        raise UnsupportedError(f"num_beams={beams}: beam search can't be decoded speculatively; use num_beams=1")
    _check_mode(generation_config)
    if input_ids.shape[1] == 0 and model_kwargs.get("inputs_embeds") is None:
        raise InputError("the prompt is empty: expected input_ids with at least one token, e.g. the bos token")
    if not generation_config.use_cache:
        raise UnsupportedError("use_cache=False: verification needs the key-value cache; leave use_cache at True")
    if getattr(model, "_is_stateful", False) or model_kwargs.get("past_key_values") is None:
        raise UnsupportedError(
            f"{type(model).__name__} keeps a recurrent state or a cache of its own, from which rejected draft tokens "
            "can't be taken back; use plain generate"
        )
    _check_ranks(model)


def _check_mode(generation_config: Any) -> None:
    mode = generation_config.get_generation_mode()
    if mode == GenerationMode.ASSISTED_GENERATION:
        raise UnsupportedError(
            "another kind of speculation is asked for as well (prompt_lookup_num_tokens, assistant_early_exit or "
            "use_mtp, in the arguments or in the model's generation_config): leave it out, or leave out custom_generate"
        )
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise UnsupportedError(
            f"{getattr(mode, 'value', mode)}: only greedy decoding and sampling can be verified; leave out the "
            "options that ask for it (penalty_alpha, dola_layers, constraints, force_words_ids)"
        )


def _check_ranks(model: Any) -> None:
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
    from transformers.integrations.fsdp import is_fsdp_managed_module

    if is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model):
        raise UnsupportedError(
            "DeepSpeed ZeRO-3 and FSDP need as many forward passes on every rank, and drafts are accepted unevenly: "
            "the ranks would wait for one another for ever; use plain generate"
        )
