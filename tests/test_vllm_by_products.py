"""Real vLLM with the drafters that live on the model's own by-products: the same text, and drafts that are accepted."""

from __future__ import annotations

from typing import Any

import pytest
from vllm_runs import REQUESTS, assert_same, engine, prompt, statistics

pytestmark = [pytest.mark.vllm, pytest.mark.model]

PROMPTS = [prompt(request) for request in REQUESTS[::2]]


def greedy(**options: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=40, **options)


@pytest.fixture(scope="module")
def plain(model_path: Any) -> list[Any]:
    """What the engine says without drafts, with the two best log-probabilities a token."""
    with engine(model_path, drafting=False) as llm:
        return [out.outputs[0] for out in llm.generate(PROMPTS, greedy(logprobs=2), use_tqdm=False)]


@pytest.mark.parametrize(
    "freedraft",
    [
        {"drafter": "token_recycling"},
        {"drafter": "jacobi"},
        {"drafter": "fusion", "recycling": True, "scope": "off"},
    ],
    ids=["token_recycling", "jacobi", "fusion"],
)
def test_greedy_text_is_the_same(model_path: Any, plain: list[Any], freedraft: dict[str, Any]) -> None:
    before = statistics()
    with engine(model_path, freedraft=freedraft) as llm:
        outs = llm.generate(PROMPTS, greedy(), use_tqdm=False)
        outs += llm.generate(PROMPTS[:1], greedy(), use_tqdm=False)
    now = {name: value - before.get(name, 0) for name, value in statistics().items()}
    for out, expected in zip(outs, [*plain, plain[0]], strict=True):
        assert_same(list(out.outputs[0].token_ids), expected)
    assert now["errors"] == 0
    # Right drafts that no text could have given, but for fusion, which has both.
    assert now["accepted_tokens"] > 20
