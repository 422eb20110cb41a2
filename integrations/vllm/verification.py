"""Verification in vLLM, shorter where it gives the same tokens.

vLLM verifies in each step as if every row had a draft and might sample. Two cases need less:

- no row has a draft: the target's own tokens are sampled as without speculation;
- all rows decode greedily, with nothing that changes the order of the logits: the likeliest token of every position is
  found once, where the logits are, instead of copying them, twice for the positions of drafts. On a GPU this is left to
  vLLM, whose kernels need no copy back to the host.

Greedy tokens, and those of requests with a seed, are the same as the long way's; others have the same distribution.
Anything else is vLLM's own, and so is everything after a failure here.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from freedraft.retrieval.jit import kernel
from freedraft.retrieval.ragged import Int32, Int64

logger = logging.getLogger("freedraft")

ARGUMENTS = ["metadata", "draft_probs", "logits", "sampling_metadata"]
"""What vLLM's rejection sampler is called with, as far as it is known here."""
REJECTED = -1
"""What vLLM writes in place of tokens behind the last one of a row."""


def shorten_verification() -> None:
    """Take the shorter way in vLLM's rejection sampler, in this process; in a vLLM that has none like it do nothing.

    Compiles the kernel.
    """
    try:
        from vllm.v1.sample.rejection_sampler import RejectionSampler
        from vllm.v1.sample.sampler import Sampler

        forward = RejectionSampler.forward
        known = [*inspect.signature(forward).parameters][1:] == ARGUMENTS
        known &= "predict_bonus_token" in inspect.signature(Sampler.forward).parameters
    except (ImportError, AttributeError):
        return
    if not known:
        return
    one = np.zeros(1, np.int64)
    accept_greedy(one, one, one, one, one, np.zeros((1, 1), np.int32))
    if not hasattr(forward, "shortened"):
        RejectionSampler.forward = shortened(forward)


def restore_verification() -> None:
    """Take vLLM's own way again, in this process."""
    try:
        from vllm.v1.sample.rejection_sampler import RejectionSampler

        if hasattr(RejectionSampler.forward, "shortened"):
            RejectionSampler.forward = RejectionSampler.forward.__wrapped__
    except (ImportError, AttributeError):
        return


def shortened(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`RejectionSampler.forward`, but the two cases above are not left to it."""
    failed = False

    def verified_greedy(sampler: Any, metadata: Any, logits: Any, sampling_metadata: Any) -> Any:
        """None where it does not apply, or failed, once and for all."""
        nonlocal failed
        if failed:
            return None
        try:
            if logits.device.type == "cpu" and keeps_order(sampling_metadata):
                return verify_greedy(sampler, metadata, logits)
        except Exception:
            failed = True
            logger.exception("freedraft: the short way through verification failed; vLLM's own is taken from now on")
        return None

    @functools.wraps(forward)
    def shorter(this: Any, metadata: Any, draft_probs: Any, logits: Any, sampling_metadata: Any) -> Any:
        # In synthetic mode, for measurements, drafts are accepted at a rate that was told.
        if not getattr(this, "synthetic_mode", False):
            if not any(metadata.num_draft_tokens):
                # As vLLM calls it for what follows a draft.
                return this.sampler(logits=logits, sampling_metadata=sampling_metadata, predict_bonus_token=True)
            verified = verified_greedy(this.sampler, metadata, logits, sampling_metadata)
            if verified is not None:
                return verified
        return forward(this, metadata, draft_probs, logits, sampling_metadata)

    shorter.shortened = True  # type: ignore[attr-defined]
    return shorter


def keeps_order(sampling_metadata: Any) -> bool:
    """Whether every row decodes greedily, by the logits as they are, and no logits or log-probabilities are asked for.

    A processor of logits that this does not know is taken to change them.
    """
    try:
        thinking = getattr(sampling_metadata, "thinking_budget_state_holder", None)
        return bool(
            sampling_metadata.all_greedy
            and sampling_metadata.max_num_logprobs is None
            and not getattr(sampling_metadata, "logprob_token_ids", None)
            and sampling_metadata.no_penalties
            and sampling_metadata.allowed_token_ids_mask is None
            and not sampling_metadata.bad_words_token_ids
            and (thinking is None or not thinking.has_tracked_requests())
            # With drafts vLLM has one processor of logits, which only acts on requests with `min_tokens`.
            and all(not one.min_toks for one in sampling_metadata.logitsprocs.non_argmax_invariant)
        )
    except AttributeError:
        return False


def verify_greedy(sampler: Any, metadata: Any, logits: Any) -> Any:
    """The accepted tokens of each row, and one of the target's own: vLLM's `SamplerOutput`.

    Args:
        sampler: vLLM's, for a step without drafts.
        metadata: vLLM's, of the drafts.
        logits: `(positions, vocabulary)`, on the CPU.
    """
    import torch
    from vllm.v1.outputs import SamplerOutput

    likeliest = sampler.greedy_sample(logits.to(torch.float32)).numpy().astype(np.int64)
    ends, drafted, target, bonus = (
        tensor.numpy().astype(np.int64)
        for tensor in (
            metadata.cu_num_draft_tokens,
            metadata.draft_token_ids,
            metadata.target_logits_indices,
            metadata.bonus_logits_indices,
        )
    )
    tokens = np.full((len(ends), max(metadata.num_draft_tokens) + 1), REJECTED, np.int32)
    accept_greedy(likeliest, drafted, ends, target, bonus, tokens)
    return SamplerOutput(sampled_token_ids=torch.from_numpy(tokens), logprobs_tensors=None)


@kernel
def accept_greedy(likeliest: Int64, drafted: Int64, ends: Int64, target: Int64, bonus: Int64, tokens: Int32) -> None:
    """Accept the tokens of each draft that the target finds likeliest, up to the first that it does not.

    Args:
        likeliest: int64, the target's token at each position.
        drafted: int64, the drafts, one after the other.
        ends: int64 `(rows,)`, where each draft ends.
        target: int64, the position that verifies each drafted token.
        bonus: int64 `(rows,)`, the position behind each draft.
        tokens: int32 `(rows, longest draft + 1)`, to write to.
    """
    at = 0
    for row in range(len(ends)):
        accepted = 0
        right = True
        while right and at < ends[row]:
            tokens[row, accepted] = likeliest[target[at]]
            right = likeliest[target[at]] == drafted[at]
            accepted += 1
            at += 1
        if right:
            tokens[row, accepted] = likeliest[bonus[row]]
        at = ends[row]
