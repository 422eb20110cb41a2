"""Defects of vLLM that speculation without drafts runs into, mended in place."""

from __future__ import annotations

from typing import Any


def sample_empty_batches() -> None:
    """Let the rejection sampler take a step in which no row has a draft, on a CPU and with `top_k`.

    vLLM (0.32) filters the logits of all draft positions by `top_k` even where there are none, and on a CPU it then
    asks for the greatest of no values, which ends the engine. Every proposer that may draft nothing meets it. Logits
    without a row need no filter, so nothing else changes; a vLLM without this function is left as it is.
    """
    from vllm.v1.sample import rejection_sampler

    apply = getattr(rejection_sampler, "apply_top_k_top_p", None)
    if apply is None or getattr(apply, "takes_empty_batches", False):
        return

    def apply_top_k_top_p(logits: Any, *args: Any, **kwargs: Any) -> Any:
        return apply(logits, *args, **kwargs) if logits.shape[0] else logits

    apply_top_k_top_p.takes_empty_batches = True  # type: ignore[attr-defined]
    rejection_sampler.apply_top_k_top_p = apply_top_k_top_p
