"""The shorter way through vLLM's verification: vLLM's own tokens, by vLLM's own classes."""

from __future__ import annotations

import importlib
import logging
import sys
from typing import Any

import numpy as np
import pytest
from vllm_stand_in import OUTSIDE, vllm_config

from freedraft.integrations.vllm import Proposer

VOCABULARY = 50


@pytest.fixture(scope="module", autouse=True)
def kernels_of_a_cpu() -> None:
    """vLLM's own stand-ins for its Triton kernels; it looks for these in all modules and stumbles over llvmlite's."""
    from vllm.platforms import current_platform

    for module in ("sample.rejection_sampler", "spec_decode.utils", "worker.block_table", "worker.mamba_utils"):
        importlib.import_module(f"vllm.v1.{module}")
    hidden = {name: module for name, module in sys.modules.items() if name.startswith("llvmlite")}
    for name in hidden:
        del sys.modules[name]
    try:
        current_platform.register_triton_kernel_overrides()
    finally:
        sys.modules.update(hidden)


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside of this process nothing is configured, and afterwards vLLM's class is as before."""
    from vllm.v1.sample.rejection_sampler import RejectionSampler

    for variable in OUTSIDE:
        monkeypatch.delenv(variable, raising=False)
    forward = RejectionSampler.forward
    monkeypatch.setattr(RejectionSampler, "forward", getattr(forward, "__wrapped__", forward))


def sampling(rows: int, **changed: Any) -> Any:
    """vLLM's description of how `rows` rows are sampled: greedily."""
    import torch
    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.sample.metadata import SamplingMetadata

    fields: dict[str, Any] = {
        "temperature": None,
        "all_greedy": True,
        "all_random": False,
        "top_p": None,
        "top_k": None,
        "generators": {},
        "max_num_logprobs": None,
        "no_penalties": True,
        "prompt_token_ids": None,
        "frequency_penalties": torch.zeros(rows),
        "presence_penalties": torch.zeros(rows),
        "repetition_penalties": torch.ones(rows),
        "output_token_ids": [[] for _ in range(rows)],
        "allowed_token_ids_mask": None,
        "bad_words_token_ids": {},
        "logitsprocs": LogitsProcessors(),
        "spec_token_ids": [[] for _ in range(rows)],
    }
    return SamplingMetadata(**(fields | changed))


def step(drafted: list[int], seed: int) -> tuple[Any, Any]:
    """A step that verifies drafts of these lengths, many of their tokens right: vLLM's metadata, and logits."""
    import torch
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

    rng = np.random.default_rng(seed)
    numbers = np.array(drafted)
    logits = torch.from_numpy(rng.integers(0, 30, (int(numbers.sum()) + len(numbers), VOCABULARY)).astype(np.float32))
    first = np.cumsum(numbers + 1) - numbers - 1
    target = np.concatenate([np.arange(n) + at for n, at in zip(drafted, first, strict=True)]).astype(np.int32)
    best = logits.argmax(-1).numpy()[target]
    draft = np.where(rng.random(len(target)) < 0.7, best, rng.integers(0, VOCABULARY, len(target)))
    tensor = torch.from_numpy
    metadata = SpecDecodeMetadata(
        draft_token_ids=tensor(draft.astype(np.int32)),
        num_draft_tokens=drafted,
        cu_num_draft_tokens=tensor(np.cumsum(numbers).astype(np.int32)),
        cu_num_sampled_tokens=tensor(np.cumsum(numbers + 1).astype(np.int32)),
        target_logits_indices=tensor(target),
        bonus_logits_indices=tensor((first + numbers).astype(np.int32)),
        logits_indices=torch.arange(len(logits), dtype=torch.int32),
    )
    return metadata, logits


def both(metadata: Any, logits: Any, sampling_metadata: Any, seed: int = 0, ours: Any = None) -> tuple[Any, Any, int]:
    """What vLLM's rejection sampler gives, what the shortened one does, and how often that asked vLLM's."""
    import torch
    from vllm.v1.sample.rejection_sampler import RejectionSampler
    from vllm.v1.sample.sampler import Sampler

    from freedraft.integrations.vllm.verification import shortened

    own = RejectionSampler.forward
    asked = 0

    def counted(*args: Any) -> Any:
        nonlocal asked
        asked += 1
        return own(*args)

    sampler = RejectionSampler(Sampler())
    torch.manual_seed(seed)
    expected = own(sampler, metadata, None, logits.clone(), sampling_metadata)
    torch.manual_seed(seed)
    found = (ours or shortened)(counted)(sampler, metadata, None, logits.clone(), sampling_metadata)
    return expected, found, asked


@pytest.mark.parametrize("drafted", [[0, 0, 0], [3], [2, 0, 5, 1], [0, 12, 0], [1] * 40])
@pytest.mark.parametrize("seed", range(6))
def test_greedy_rows_get_vllms_tokens(drafted: list[int], seed: int) -> None:
    """Ties between logits are frequent here."""
    expected, found, asked = both(*step(drafted, seed), sampling(len(drafted)))
    assert found.sampled_token_ids.dtype == expected.sampled_token_ids.dtype
    assert found.sampled_token_ids.tolist() == expected.sampled_token_ids.tolist()
    assert asked == 0


@pytest.mark.parametrize("form", ["bfloat16", "a view"])
def test_logits_of_another_form(form: str) -> None:
    import torch

    metadata, logits = step([2, 0, 5, 1], 7)
    wide = torch.cat([logits, logits + 100.0], dim=1)
    expected, found, asked = both(
        metadata, logits.to(torch.bfloat16) if form == "bfloat16" else wide[:, :VOCABULARY], sampling(4)
    )
    assert asked == 0
    assert found.sampled_token_ids.tolist() == expected.sampled_token_ids.tolist()


def test_a_failure_of_the_short_way_costs_the_short_way_only(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from freedraft.integrations.vllm import verification

    def fail(*_: Any) -> None:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(verification, "verify_greedy", fail)
    made: list[Any] = []

    def once(forward: Any) -> Any:
        made.append(verification.shortened(forward) if not made else made[0])
        return made[0]

    with caplog.at_level(logging.WARNING, "freedraft"):
        for seed in range(3):
            expected, found, _ = both(*step([2, 1], seed), sampling(2), ours=once)
            assert found.sampled_token_ids.tolist() == expected.sampled_token_ids.tolist()
    assert len(caplog.records) == 1


def test_a_step_without_a_draft_is_sampled_as_vllm_does() -> None:
    import torch

    metadata, logits = step([0, 0, 0, 0], 1)
    at_random = sampling(4, temperature=torch.ones(4), all_greedy=False, all_random=True)
    for seed in range(5):
        expected, found, asked = both(metadata, logits / 10, at_random, seed)
        assert found.sampled_token_ids.tolist() == expected.sampled_token_ids.tolist()
        assert asked == 0


def test_a_step_without_a_draft_has_its_log_probabilities() -> None:
    import torch

    metadata, logits = step([0, 0, 0], 2)
    expected, found, asked = both(metadata, logits, sampling(3, max_num_logprobs=2))
    assert asked == 0
    for name in ("logprob_token_ids", "logprobs", "selected_token_ranks"):
        theirs, ours = (getattr(one.logprobs_tensors, name) for one in (expected, found))
        assert torch.equal(theirs, ours), name


class MinTokens:
    """Stands in for vLLM's processor of `min_tokens`."""

    def __init__(self, **min_toks: int) -> None:
        self.min_toks = min_toks

    def is_argmax_invariant(self) -> bool:
        return False

    def apply(self, logits: Any) -> Any:
        return logits


class Thinking:
    """Stands in for vLLM's budget of tokens to think with."""

    def __init__(self, requests: bool) -> None:
        self.requests = requests

    def has_tracked_requests(self) -> bool:
        return self.requests

    def update_state(self, *args: Any, **kwargs: Any) -> None:
        """There is none."""

    def apply_to_logits(self, logits: Any, *args: Any, **kwargs: Any) -> Any:
        return logits


class Unknown(MinTokens):
    """A processor that has nothing of the kind."""

    def __init__(self) -> None:
        pass


@pytest.mark.parametrize(
    ("what", "is_asked"),
    [
        ("nothing", False),
        ("temperature", True),
        ("logprobs", True),
        ("penalties", True),
        ("allowed", True),
        ("bad words", True),
        ("min_tokens", True),
        ("no min_tokens", False),
        ("a processor", True),
        ("thinking", True),
        ("no thinking", False),
    ],
)
def test_what_changes_the_order_of_logits_is_left_to_vllm(what: str, is_asked: bool) -> None:
    import torch
    from vllm.v1.sample.logits_processor import LogitsProcessors

    changed: dict[str, dict[str, Any]] = {
        "nothing": {},
        "temperature": {"temperature": torch.tensor([1.0, 0.0]), "all_greedy": False},
        "logprobs": {"max_num_logprobs": 1},
        "penalties": {
            "no_penalties": False,
            "presence_penalties": torch.ones(2),
            "prompt_token_ids": torch.zeros((2, 1), dtype=torch.int64),
        },
        "allowed": {"allowed_token_ids_mask": torch.arange(VOCABULARY).expand(2, -1) % 2 == 0},
        "bad words": {"bad_words_token_ids": {0: [[3]]}},
        "min_tokens": {"logitsprocs": LogitsProcessors([MinTokens(request=4)])},  # type: ignore[list-item]
        "no min_tokens": {"logitsprocs": LogitsProcessors([MinTokens()])},  # type: ignore[list-item]
        "a processor": {"logitsprocs": LogitsProcessors([Unknown()])},  # type: ignore[list-item]
        "thinking": {"thinking_budget_state_holder": Thinking(True)},
        "no thinking": {"thinking_budget_state_holder": Thinking(False)},
    }
    metadata, logits = step([2, 3], 3)
    drafts = metadata.draft_token_ids.tolist()
    _, found, asked = both(metadata, logits, sampling(2, spec_token_ids=[drafts[:2], drafts[2:]], **changed[what]))
    assert (asked == 1) == is_asked
    assert found.sampled_token_ids.shape == (2, 4)


def test_log_probabilities_of_some_tokens_are_left_to_vllm() -> None:
    """With which its rejection sampler (0.32) fails where there are drafts."""
    from freedraft.integrations.vllm.verification import keeps_order

    assert keeps_order(sampling(2))
    assert not keeps_order(sampling(2, logprob_token_ids={0: [1, 2]}))


def test_rates_of_acceptance_that_were_told_are_left_to_vllm() -> None:
    from freedraft.integrations.vllm.verification import shortened

    class Synthetic:
        synthetic_mode = True

    metadata, logits = step([0, 0], 4)
    assert shortened(lambda *_: "vLLM's")(Synthetic(), metadata, None, logits, sampling(2)) == "vLLM's"


def test_a_rejection_sampler_of_another_form_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.sample.rejection_sampler import RejectionSampler

    def forward(self: Any, metadata: Any, draft_probs: Any, target_logits: Any, bonus_token_ids: Any) -> None:
        """As in an earlier vLLM."""

    monkeypatch.setattr(RejectionSampler, "forward", forward)
    Proposer(vllm_config())
    assert RejectionSampler.forward is forward


def test_a_proposer_takes_the_short_way_once_and_not_where_it_is_told_not_to() -> None:
    from vllm.v1.sample.rejection_sampler import RejectionSampler

    own = RejectionSampler.forward
    Proposer(vllm_config({"vllm": {"short_verification": False}}))
    assert RejectionSampler.forward is own
    Proposer(vllm_config())
    first = RejectionSampler.forward
    assert first is not own
    Proposer(vllm_config())
    assert RejectionSampler.forward is first
    Proposer(vllm_config({"vllm": {"short_verification": False}}))
    assert RejectionSampler.forward is own
