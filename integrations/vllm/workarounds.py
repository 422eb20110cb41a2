"""Defects of vLLM's sampling of drafts on a CPU, mended in place; without them sampled text would be wrong there."""

from __future__ import annotations

from typing import Any


def mend_sampling_on_cpu() -> None:
    """Make vLLM's rejection sampler exact on a CPU, as it is on a GPU; elsewhere do nothing.

    Two defects, seen in vLLM 0.32, that every kind of speculation meets there:

    - what spreads the temperature, `top_k` and `top_p` of a request over its draft positions returns memory that was
      never written (vLLM issue 55005, https://github.com/vllm-project/vllm/issues/55005);
    - where no row has a draft and one samples with `top_k`, the greatest of no values is asked for: the engine ends.

    A vLLM without these functions is left as it is.
    """
    from vllm.platforms import current_platform
    from vllm.v1.sample import rejection_sampler

    if not current_platform.is_cpu():
        return
    if hasattr(rejection_sampler, "expand_batch_to_tokens"):
        rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens
    apply = getattr(rejection_sampler, "apply_top_k_top_p", None)
    if apply is not None and not hasattr(apply, "mended"):
        rejection_sampler.apply_top_k_top_p = skipping_empty(apply)


def expand_batch_to_tokens(
    x: Any, cu_num_tokens: Any, num_tokens: int, replace_from: float = 0, replace_to: float = 0
) -> Any:
    """Repeat `x[i]`, of shape `(batch,)`, for each token of row i: `(num_tokens,)`, of the same dtype.

    Args:
        x: one value a row.
        cu_num_tokens: `(batch,)`, tokens of the rows up to and including each.
        num_tokens: of all rows.
        replace_from: this value becomes `replace_to`.
        replace_to: see `replace_from`.
    """
    import torch

    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    expanded = torch.repeat_interleave(x, counts.long(), output_size=num_tokens)
    return expanded.masked_fill(expanded == replace_from, replace_to) if replace_from != replace_to else expanded


def skipping_empty(apply: Any) -> Any:
    """`apply_top_k_top_p`, but logits without a row come back as they are."""

    def apply_top_k_top_p(logits: Any, *args: Any, **kwargs: Any) -> Any:
        return apply(logits, *args, **kwargs) if logits.shape[0] else logits

    apply_top_k_top_p.mended = True  # type: ignore[attr-defined]
    return apply_top_k_top_p
