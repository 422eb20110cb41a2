"""Real vLLM with the real model: the same text as without drafts, in all that an engine does."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from packaging.version import Version
from vllm_runs import ARTICLE, CODE, REQUESTS, WIDTH, assert_same, engine, prompt, statistics

pytestmark = [pytest.mark.vllm, pytest.mark.model]

TOKENS = 40
STOP = ["\n\n", " the", "."]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
PROMPTS = [prompt(request) for request in REQUESTS]
# Prompts that end 30, 13, 12, 6 and 2 places before the last of a row: there drafts must shrink, and calls are skipped.
LONG = [WIDTH - 30, WIDTH - 13, WIDTH - 12, WIDTH - 6, WIDTH - 2]


def greedy(**options: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(**{"temperature": 0, "max_tokens": TOKENS, **options})


def json_grammar(**options: Any) -> Any:
    from vllm.sampling_params import StructuredOutputsParams

    return greedy(structured_outputs=StructuredOutputsParams(json=SCHEMA), **options)


def long_prompts(llm: Any) -> list[dict[str, list[int]]]:
    text = llm.get_tokenizer().encode(prompt(f"Repeat this code:\n{CODE}\n{ARTICLE}\n{CODE}\n{ARTICLE}"))
    return [{"prompt_token_ids": text[: length // 2] + text[: length - length // 2]} for length in LONG]


@pytest.fixture(scope="module")
def plain(model_path: Any) -> dict[str, Any]:
    """What the same engine says without drafts, with the two best log-probabilities a token."""
    with engine(model_path, drafting=False) as llm:
        jobs = {
            "chat": (PROMPTS, greedy(logprobs=2)),
            "long": (long_prompts(llm), greedy(logprobs=2, max_tokens=60, ignore_eos=True)),
            "json": ([PROMPTS[15]] * 2, json_grammar(logprobs=2)),
            "stop": (PROMPTS[:6], greedy(logprobs=2, stop=STOP)),
        }
        return {name: [out.outputs[0] for out in llm.generate(*job, use_tqdm=False)] for name, job in jobs.items()}


def same(llm: Any, prompts: Any, sampling: Any, plain: list[Any]) -> None:
    for out, expected in zip(llm.generate(prompts, sampling, use_tqdm=False), plain, strict=True):
        assert_same(list(out.outputs[0].token_ids), expected)


@pytest.mark.parametrize(
    "freedraft",
    [
        {"drafter": "token_recycling"},
        # Its own in the slow tests; the last has it among its sources.
        pytest.param({"drafter": "jacobi"}, marks=pytest.mark.slow),
        {"drafter": "fusion", "recycling": True, "drafters": {"jacobi": {}, "lookahead": {}}, "scope": "off"},
    ],
    ids=["token_recycling", "jacobi", "fusion"],
)
def test_greedy_text_is_the_same_with_drafts_from_the_models_rankings(
    model_path: Any, plain: Any, freedraft: dict[str, Any]
) -> None:
    before = statistics()
    with engine(model_path, freedraft=freedraft) as llm:
        same(llm, PROMPTS[::2], greedy(), plain["chat"][::2])
        same(llm, PROMPTS[:1], greedy(), plain["chat"][:1])
    now = statistics()
    assert now["errors"] == before.get("errors", 0)
    # Right drafts that no text could have given, but for fusion, which has both.
    assert now["accepted_tokens"] - before.get("accepted_tokens", 0) > 20


def test_greedy_text_is_the_same_with_what_is_configured_by_default(model_path: Any, plain: Any) -> None:
    """Fusion, paced by the times of this machine's steps: when it drafts differs from run to run."""
    before = statistics()
    with engine(model_path, freedraft={"pacing": {}}) as llm:
        same(llm, PROMPTS, greedy(), plain["chat"])
        for text, expected in zip(PROMPTS[6:9], plain["chat"][6:9], strict=True):
            same(llm, text, greedy(), [expected])
    now = statistics()
    assert now["errors"] == before.get("errors", 0)
    assert now["draft_tokens"] > before.get("draft_tokens", 0)
    assert now["withheld_tokens"] > before.get("withheld_tokens", 0)


def test_preemption_chunked_prefill_and_no_prefix_caching(model_path: Any, plain: Any) -> None:
    """A KV cache for one full sequence, and prompts in pieces of 64 tokens for a drafter that takes in 40."""
    with engine(
        model_path,
        freedraft={"vllm": {"step_tokens": 40, "idle_sequences": 1}},
        enable_prefix_caching=False,
        enable_chunked_prefill=True,
        max_num_batched_tokens=128,
        long_prefill_token_threshold=64,
        block_size=32,
        num_gpu_blocks_override=WIDTH // 32 + 1,
    ) as llm:
        before = statistics()
        same(llm, PROMPTS, greedy(), plain["chat"])
        now = statistics()
        preemptions = [metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions"]
    assert sum(preemptions) > 0
    assert now["accepted_tokens"] - before.get("accepted_tokens", 0) > 50
    assert now["errors"] == before.get("errors", 0)


@pytest.fixture(scope="module")
def drafting(model_path: Any) -> Iterator[Any]:
    """An engine with freedraft and with prefix caching."""
    with engine(model_path, enable_prefix_caching=True, block_size=32) as llm:
        yield llm


def test_greedy_text_is_the_same_all_at_once(drafting: Any, plain: Any) -> None:
    before = statistics()
    same(drafting, PROMPTS, greedy(), plain["chat"])
    now = statistics()
    assert now["accepted_tokens"] - before.get("accepted_tokens", 0) > 100
    assert now["errors"] == 0


def test_greedy_text_is_the_same_alone(drafting: Any, plain: Any) -> None:
    for text, expected in zip(PROMPTS, plain["chat"], strict=True):
        same(drafting, text, greedy(), [expected])
    same(drafting, PROMPTS[7], greedy(), plain["chat"][7:8])
    assert sum(metric.value for metric in drafting.get_metrics() if metric.name == "vllm:prefix_cache_hits") > 0


def test_several_replies_to_one_prompt_are_each_the_same(drafting: Any, plain: Any) -> None:
    # vLLM takes no n with greedy sampling; the best token of one is the same, on the path of sampling.
    before = statistics()["accepted_tokens"]
    outs = drafting.generate(PROMPTS[6:9], greedy(temperature=1, top_k=1, n=3), use_tqdm=False)
    assert [len(out.outputs) for out in outs] == [3, 3, 3]
    for out, expected in zip(outs, plain["chat"][6:9], strict=True):
        for one in out.outputs:
            assert_same(list(one.token_ids), expected)
    assert statistics()["accepted_tokens"] > before


def test_stop_strings_end_where_they_did(drafting: Any, plain: Any) -> None:
    import vllm

    # vLLM 0.27 ends the text there too, but hands out all tokens of that step, whoever drafted them.
    tokens_end_there = Version(vllm.__version__) >= Version("0.32")
    for out, expected in zip(
        drafting.generate(PROMPTS[:6], greedy(stop=STOP), use_tqdm=False), plain["stop"], strict=True
    ):
        tokens = list(out.outputs[0].token_ids)
        if not tokens_end_there and out.outputs[0].stop_reason:
            tokens = tokens[: len(expected.token_ids)]
        assert_same(tokens, expected)
        if tokens == list(expected.token_ids):
            assert out.outputs[0].text == expected.text
            assert out.outputs[0].stop_reason == expected.stop_reason


def test_a_grammar_is_kept(drafting: Any, plain: Any) -> None:
    import json

    same(drafting, [PROMPTS[15]] * 2, json_grammar(), plain["json"])
    text = drafting.generate(PROMPTS[15], json_grammar(), use_tqdm=False)[0].outputs[0].text
    assert set(json.loads(text)) == {"name", "age"}


def test_rows_are_filled_to_the_last_place(drafting: Any, plain: Any) -> None:
    outs = drafting.generate(long_prompts(drafting), greedy(max_tokens=60, ignore_eos=True), use_tqdm=False)
    assert [len(out.outputs[0].token_ids) for out in outs] == [WIDTH - length for length in LONG]
    for out, expected in zip(outs, plain["long"], strict=True):
        assert_same(list(out.outputs[0].token_ids), expected)


def test_requests_aborted_midway_leave_the_others_as_they_were(drafting: Any, plain: Any) -> None:
    core = drafting.llm_engine
    for i, text in enumerate(PROMPTS):
        core.add_request(f"{i}", text, greedy())
    to_abort = set(range(0, len(PROMPTS), 3))
    given: dict[int, list[int]] = {}
    ended: dict[int, list[int]] = {}
    while core.has_unfinished_requests():
        for out in core.step():
            name, reply = int(out.request_id.split("-")[0]), out.outputs[0]
            tokens = list(reply.token_ids)
            if out.finished and reply.finish_reason != "abort":
                ended[name] = tokens
            elif name in to_abort and len(tokens) > 3 + name // 3:
                to_abort.remove(name)
                given[name] = tokens
                core.abort_request([f"{name}"])
    assert len(given) >= 6
    assert not {*given} & {*ended}
    assert len(given) + len(ended) == len(PROMPTS)
    for name, tokens in given.items():
        wanted = plain["chat"][name]
        assert_same(tokens, SimpleNamespace(token_ids=wanted.token_ids[: len(tokens)], logprobs=wanted.logprobs))
    for name, tokens in ended.items():
        assert_same(tokens, plain["chat"][name])


@pytest.mark.parametrize("seeded", [False, True], ids=["the engine's dice", "a seed a request"])
def test_sampling_has_the_targets_distribution(drafting: Any, model: Any, tokenizer: Any, seeded: bool) -> None:
    """Four tokens out of two, 16 possible replies, against the probabilities that the model itself gives them."""
    import torch
    from scipy.stats import chisquare
    from vllm import SamplingParams

    allowed = [tokenizer.encode(word)[0] for word in (" heads", " tails")]
    text = "The coin shows" + " heads tails heads heads tails" * 3 + " tails heads"
    prompt_ids = tokenizer.encode(text)
    replies = list(itertools.product(allowed, repeat=4))
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt_ids, *reply] for reply in replies])).logits
    chances = torch.log_softmax(logits[:, len(prompt_ids) - 1 : -1][:, :, allowed].double(), -1)
    expected = [
        float(torch.exp(sum(row[i][allowed.index(token)] for i, token in enumerate(reply))))
        for row, reply in zip(chances, replies, strict=True)
    ]
    before = statistics()
    number = 640
    options = {"temperature": 1, "max_tokens": 4, "n": 8, "allowed_token_ids": allowed, "ignore_eos": True}
    # vLLM gives the replies to one request its seed and the following ones.
    seeds = range(0, number, 8) if seeded else [None] * (number // 8)
    outs = drafting.generate(
        [{"prompt_token_ids": prompt_ids}] * len(seeds),
        [SamplingParams(seed=seed, **options) for seed in seeds],
        use_tqdm=False,
    )
    assert statistics()["draft_tokens"] - before["draft_tokens"] > 200
    seen = dict.fromkeys(replies, 0)
    for one in (one for out in outs for one in out.outputs):
        seen[tuple(one.token_ids)] += 1
    assert sum(seen.values()) == number
    likely = [i for i, chance in enumerate(expected) if chance * number >= 5]
    rest = [i for i in range(len(replies)) if i not in likely]
    observed = [seen[replies[i]] for i in likely]
    wanted = [number * expected[i] for i in likely]
    if rest:
        observed.append(sum(seen[replies[i]] for i in rest))
        wanted.append(number * sum(expected[i] for i in rest))
    assert len(observed) >= 4
    assert chisquare(observed, wanted).pvalue > 1e-4
