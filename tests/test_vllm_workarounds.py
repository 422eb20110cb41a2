"""Defects of vLLM's sampling on a CPU are mended where a proposer is made."""

from __future__ import annotations

import pytest
from vllm_stand_in import OUTSIDE, vllm_config

from freedraft.integrations.vllm import Proposer


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in OUTSIDE:
        monkeypatch.delenv(variable, raising=False)


def test_sampling_on_a_cpu_is_mended() -> None:
    """`integrations.vllm.workarounds` says what vLLM (0.32) gets wrong there."""
    import torch
    from vllm.v1.sample import rejection_sampler

    Proposer(vllm_config())
    Proposer(vllm_config())
    k = torch.tensor([2], dtype=torch.int32)
    assert rejection_sampler.apply_top_k_top_p(torch.empty(0, 9), k[:0], None).shape == (0, 9)
    filtered = rejection_sampler.apply_top_k_top_p(torch.arange(9.0)[None], k, None)
    assert filtered.isfinite().sum() == 2
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    expand = rejection_sampler.expand_batch_to_tokens
    for values in (torch.tensor([0.5, 0.0, -1.0]), torch.tensor([3, 0, 7], dtype=torch.int32)):
        expected = values[[0, 0, 2, 2, 2]]
        assert expand(values, ends, 5).equal(expected)
        assert expand(values, ends, 5, replace_from=values[2].item(), replace_to=1).equal(
            torch.where(expected == values[2], torch.ones_like(expected), expected)
        )
        assert expand(values[:0], ends[:0], 0).shape == (0,)
