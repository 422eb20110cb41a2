"""Tree verification: the text and the random stream are those of plain decoding, whatever the tree."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, ClassVar

import drafters
import numpy as np
import pytest
import tiny
import torch
import transformers
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from freedraft.integrations.hf import Speculative, drafting
from freedraft.integrations.hf.cache import gather_newest
from freedraft.integrations.hf.draft import Chain, Tree, as_draft
from freedraft.integrations.hf.masks import why_no_masks
from freedraft.integrations.hf.target import Target
from freedraft.integrations.hf.tokens import Tokens
from freedraft.plugins.branches import likeliest_chains
from freedraft.plugins.registry import make_drafter

one_thread = tiny.one_thread
assert_close = tiny.assert_close

WINDOW = 8
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": WINDOW},
    "Gemma2": {"sliding_window": WINDOW, "num_hidden_layers": 4},
    "Gemma3Text": {"sliding_window": WINDOW, "num_hidden_layers": 4, "sliding_window_pattern": 2},
    "Qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "Qwen3": {},
    "GPTNeoX": {},
    "Phi3": {},
    "Olmo2": {},
}
TREES: dict[str, Callable[[list[int]], Any]] = {
    "true branch": lambda text: drafters.true_branch(text, tiny.VOCABULARY),
    "random": lambda text: drafters.random_trees(tiny.VOCABULARY),
    "fusion": lambda text: make_drafter("fusion", {"shape": "tree", "min_probability": 0, "recycling": True}),
}


def model(architecture: str, attention: str = "sdpa") -> Any:
    return tiny.model(architecture, attn_implementation=attention, **MODELS[architecture])


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("length", [3, 30])
def test_greedy_is_token_identical(name: str, architecture: str, attention: str, length: int) -> None:
    ours = tiny.assert_same(model(architecture, attention), tiny.prompt(length), TREES[name], max_new_tokens=40)
    assert ours.statistics is not None
    if name == "true branch":
        assert ours.statistics.forward_passes < 16
        assert ours.statistics.drafted > 2 * ours.statistics.accepted


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("architecture", ["Llama", "Gemma2"])
@pytest.mark.parametrize("seed", range(3))
def test_sampling_draws_the_same_random_stream(name: str, architecture: str, seed: int) -> None:
    tiny.assert_same(
        model(architecture), tiny.prompt(), TREES[name], seed, max_new_tokens=40, do_sample=True, temperature=8.0,
        top_k=0,
    )  # fmt: skip


@pytest.mark.parametrize("architecture", ["Llama", "Mistral"])
def test_learned_positions_and_left_padding(architecture: str) -> None:
    ids = torch.cat([torch.full((1, 5), 2), tiny.prompt(9)], dim=1)
    mask = (torch.arange(14) >= 5).long()[None]
    for make in TREES.values():
        tiny.assert_same(model(architecture), ids, make, attention_mask=mask, max_new_tokens=30)
    config = transformers.GPT2Config(
        vocab_size=tiny.VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=40, initializer_range=0.2,
        bos_token_id=0, eos_token_id=None, pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(3)
    learned = transformers.GPT2LMHeadModel(config).eval()
    for make in TREES.values():
        tiny.assert_same(learned, ids, make, attention_mask=mask, max_length=40)


@pytest.mark.parametrize("seed", range(3))
def test_trees_over_few_tokens_come_true_by_chance(seed: int) -> None:
    # Branches that share their first tokens, duplicates among siblings, several accepted in a row.
    few: dict[str, Any] = {"suppress_tokens": [*range(50), *range(53, tiny.VOCABULARY)], "max_new_tokens": 60}

    def make(text: list[int]) -> drafters.Scripted:
        inner = drafters.random_trees(3, size=20, seed=seed)
        return drafters.Branching(lambda so_far, budget: [(50 + t, p) for t, p in inner.grow(so_far, budget)])

    for options in (few, {**few, "do_sample": True, "temperature": 8.0}):
        ours = tiny.assert_same(model("Gemma2"), tiny.prompt(), make, seed, **options)
        assert ours.statistics is not None
        assert ours.statistics.accepted > 20


@pytest.mark.parametrize("architecture", ["Llama", "Mistral", "Gemma2", "Gemma3Text"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_of_a_tree_are_those_of_its_branches(architecture: str, attention: str) -> None:
    which = model(architecture, attention)
    ids = tiny.prompt(20)
    tokens = [11, 12, 13, 14, 15, 16, 17]
    tree = Tree(tokens, [0, 0, 1, 2, 2, 5, 3])
    kwargs = {"past_key_values": DynamicCache(config=which.config), "use_cache": True}
    config = transformers.GenerationConfig()
    target = Target(which, config, kwargs)
    with torch.no_grad():
        target.prefill(ids[:, :-1])
        logits = target.verify([Tokens(ids)], [tree]).logits
        for node in range(tree.width):
            branch = [tokens[n - 1] for n in tree.path(node)[1:]]
            alone = which(torch.cat([ids, torch.tensor([branch], dtype=torch.long)], dim=1)).logits[0, -1]
            torch.testing.assert_close(logits[0, node], alone, atol=1e-3, rtol=0)
        # What is kept is one branch, and the next pass sees that one only.
        target.keep([tree], [6])
        assert target.cached == 19 + 4 == target.cache.get_seq_length()
        text = torch.cat([ids, torch.tensor([[12, 15, 16, 40]])], dim=1)
        after = target.verify([Tokens(text)], [Chain([])]).logits[0, -1]
        torch.testing.assert_close(after, which(text).logits[0, -1], atol=1e-3, rtol=0)


def test_the_distribution_of_samples() -> None:
    """Chi-squared: the four tokens behind a prompt are distributed as the model says, drafted or not."""
    which, ids = tiny.model(), tiny.prompt(6)
    # Two tokens are possible at each place, so 16 texts; their probabilities are worked out exactly.
    support = [60, 63]
    exact: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(4):
        grown = {}
        for text, chance in exact.items():
            logits = which(torch.cat([ids, torch.tensor([text], dtype=torch.long)], dim=1)).logits[0, -1, support]
            for token, share in zip(support, (logits / 4.0).softmax(-1).tolist(), strict=True):
                grown[(*text, token)] = chance * share
        exact = grown
    # The likeliest text in one branch, the unlikeliest in another.
    ordered = sorted(exact, key=lambda text: -exact[text])

    def grow(text: list[int], budget: int) -> list[tuple[int, int]]:
        likely, unlikely = ordered[0][len(text) - 6 :], ordered[-1][len(text) - 6 :]
        nodes = [(likely[0], -1), (unlikely[0], -1)]
        nodes += [(likely[1], 0), (unlikely[1], 1)] if len(likely) > 1 else []
        return nodes + ([(likely[2], 2)] if len(likely) > 2 else [])

    def four(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.tensor([input_ids.shape[1] == 10])

    options: dict[str, Any] = {
        "suppress_tokens": [t for t in range(tiny.VOCABULARY) if t not in support], "temperature": 4.0,
        "max_new_tokens": 40, "do_sample": True, "top_k": 0, "stopping_criteria": [four],
    }  # fmt: skip
    ours = Speculative(drafters.Branching(grow))
    torch.manual_seed(5)
    counts: dict[tuple[int, ...], int] = dict.fromkeys(exact, 0)
    draws = 500
    for _ in range(draws):
        counts[tuple(which.generate(ids, custom_generate=ours, **options)[0, 6:].tolist())] += 1
    statistic = sum((counts[text] - draws * chance) ** 2 / (draws * chance) for text, chance in exact.items())
    assert min(exact.values()) * draws > 5
    assert max(exact.values()) > 3 * min(exact.values())
    # 15 degrees of freedom: above 37.70 once in a thousand.
    assert statistic < 37.70
    assert ours.totals.accepted > draws


@pytest.mark.parametrize("place", [0, 1, 5, 19])
@pytest.mark.parametrize("sampled", [False, True])
def test_eos_inside_a_tree_ends_the_text(place: int, sampled: bool) -> None:
    which, ids = tiny.model(), tiny.prompt(5, seed=3)
    options: dict[str, Any] = {"max_new_tokens": 30, "do_sample": sampled}
    endless = tiny.plain(which, ids, **options)[0].tolist()
    make = TREES["true branch"]
    tiny.assert_same(which, ids, lambda text: make(endless), eos_token_id=[endless[5 + place], 199], **options)


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("width", [1, 2])
def test_stop_strings(name: str, width: int) -> None:
    which, ids, tokenizer = tiny.model(), tiny.prompt(12), tiny.tokenizer()
    text = tiny.plain(which, ids, max_new_tokens=30)[0].tolist()
    stop = tokenizer.decode(text[20 : 20 + width])
    expected = tiny.plain(which, ids, max_new_tokens=30, stop_strings=[stop], tokenizer=tokenizer)
    assert expected.shape[1] < 42
    ours = Speculative(TREES[name](text), tokenizer=tokenizer)
    actual = tiny.speculative(which, ids, ours, max_new_tokens=30, stop_strings=[stop])
    assert actual.tolist() == expected.tolist()


@pytest.mark.parametrize("which", ["all at once", "no repeated token", "guidance"])
@pytest.mark.parametrize("name", TREES)
def test_processors_see_what_plain_decoding_shows_them(name: str, which: str) -> None:
    options: dict[str, Any] = {
        "all at once": {"do_sample": True, "temperature": 6.0, "top_p": 0.95, "repetition_penalty": 1.2},
        "no repeated token": {"no_repeat_ngram_size": 1},
        "guidance": {"guidance_scale": 1.5},
    }[which]
    tiny.assert_same(tiny.model(), tiny.prompt(7), TREES[name], seed=5, max_new_tokens=30, **options)


@pytest.mark.parametrize("architecture", ["Llama", "Mistral", "Gemma2"])
@pytest.mark.parametrize("name", TREES)
def test_outputs_have_one_entry_a_token(architecture: str, name: str) -> None:
    which = model(architecture, "eager")
    options = {**tiny.EVERYTHING, "max_new_tokens": 20, "repetition_penalty": 1.1}
    expected = tiny.plain(which, tiny.prompt(5), **options)
    ours = Speculative(TREES[name](expected.sequences[0].tolist()))
    actual = tiny.speculative(which, tiny.prompt(5), ours, **options)
    assert actual.sequences.equal(expected.sequences)
    for field in ("scores", "logits", "hidden_states", "attentions"):
        assert_close(getattr(actual, field), getattr(expected, field))


@pytest.mark.parametrize("architecture", ["Llama", "Mistral"])
@pytest.mark.parametrize("stop", [8, 10, 11, 14, 25])
def test_the_cache_that_is_returned_can_be_gone_on_with(architecture: str, stop: int) -> None:
    which = model(architecture)
    text = tiny.plain(which, tiny.prompt(5), max_new_tokens=40)[0].tolist()
    ours = Speculative(TREES["true branch"](text))

    def at(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.tensor([input_ids.shape[1] >= stop])

    output = tiny.speculative(
        which, tiny.prompt(5), ours, max_new_tokens=40, return_dict_in_generate=True, stopping_criteria=[at]
    )
    assert output.sequences[0].tolist() == text[:stop]
    assert output.past_key_values.get_seq_length() == stop - 1
    if architecture == "Mistral" and stop > WINDOW and isinstance(output.past_key_values.layers[0], DynamicLayer):
        ids = output.sequences
        logits = which(ids[:, -1:], past_key_values=output.past_key_values).logits[0, -1]
        torch.testing.assert_close(logits, which(ids).logits[0, -1], atol=1e-3, rtol=0)
        return
    mask = torch.ones_like(output.sequences)
    rest = which.generate(
        output.sequences, attention_mask=mask, past_key_values=output.past_key_values, max_new_tokens=45 - stop
    )
    assert rest[0].tolist() == text


class Listening(drafters.Branching):
    feedback: ClassVar[frozenset[Any]] = frozenset({"accepted", "argmax", "top_k"})
    feedback_top_k = 3


def test_feedback_for_every_node() -> None:
    which, ids = tiny.model(), tiny.prompt()
    text = tiny.plain(which, ids, max_new_tokens=30)[0].tolist()
    grown: list[tuple[list[int], list[tuple[int, int]]]] = []
    inner = drafters.true_branch(text, tiny.VOCABULARY, seed=4)

    def grow(so_far: list[int], budget: int) -> list[tuple[int, int]]:
        nodes = list(inner.grow(so_far, budget))
        grown.append((list(so_far), nodes))
        return nodes

    drafter = Listening(grow)
    assert tiny.speculative(which, ids, Speculative(drafter), max_new_tokens=30)[0].tolist() == text
    told = [details for method, details in drafter.calls if method == "observe"]
    rejected = 0
    for (so_far, nodes), feedback in zip(grown, told, strict=False):
        assert feedback.offsets.tolist() == [0, 1 + len(nodes)]
        assert feedback.top_k.shape == (1 + len(nodes), 3)
        for node in range(len(nodes)):
            path = [node]
            while nodes[path[-1]][1] >= 0:
                path.append(nodes[path[-1]][1])
            branch = [nodes[n][0] for n in path[::-1]]
            rejected += branch != text[len(so_far) : len(so_far) + len(branch)]
            logits = which(torch.tensor([so_far + branch])).logits[0, -1]
            assert feedback.argmax[1 + node] == logits.argmax()
            assert feedback.top_k[1 + node].tolist() == logits.topk(3).indices.tolist()
    assert rejected > 20


def test_a_chain_needs_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    from freedraft.integrations.hf import masks

    monkeypatch.setattr(masks.Masks, "make", None)
    tiny.assert_same(tiny.model(), tiny.prompt(), drafters.truth, max_new_tokens=20)
    chained = drafters.Branching(lambda text, budget: [(7, -1), (8, 0), (9, 1)][:budget])
    tiny.speculative(tiny.model(), tiny.prompt(), Speculative(chained), max_new_tokens=5)
    with pytest.raises(TypeError):
        tiny.assert_same(tiny.model(), tiny.prompt(), TREES["true branch"], max_new_tokens=20)


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (lambda which: (which.config, "_attn_implementation_internal", "flash_attention_2"), "takes no mask"),
        (lambda which: (which, "rope_deltas", None), "more than one dimension"),
        (lambda which: (which.config, "alibi", True), "no position ids"),
    ],
    ids=["flash", "several dimensions", "no positions"],
)
def test_where_trees_cannot_be_verified_chains_are(
    break_it: Any, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    which = tiny.model()
    cache = DynamicCache()
    assert why_no_masks(which, cache) is None
    with monkeypatch.context() as patch:
        patch.setattr(*break_it(which), raising=False)
        refusal = why_no_masks(which, cache) or ""
    assert reason in refusal
    drafting.log_once.cache_clear()
    monkeypatch.setattr("freedraft.integrations.hf.target.why_no_masks", lambda which, cache: refusal)
    monkeypatch.setattr("freedraft.integrations.hf.masks.Masks.make", None)
    with caplog.at_level(logging.WARNING, "freedraft"):
        for _ in range(2):
            ours = tiny.assert_same(which, tiny.prompt(), TREES["true branch"], max_new_tokens=40)
    assert ours.statistics is not None
    assert ours.statistics.drafted > 0
    assert [record.getMessage() for record in caplog.records] == [
        f"freedraft: of trees only the likeliest branch is verified: {refusal}"
    ]


def test_models_and_caches_that_take_no_masks() -> None:
    cache = DynamicCache()

    class Own(torch.nn.Module):
        config = tiny.model().config

    assert "not a model of transformers" in (why_no_masks(Own(), cache) or "")

    class Strange(DynamicLayer):
        pass

    cache.layers.append(Strange())
    assert "more than keys and values" in (why_no_masks(tiny.model(), cache) or "")
    chunked = transformers.LlamaConfig(**{**tiny.SIZES, "num_hidden_layers": 1})
    chunked.layer_types = ["chunked_attention"]
    chunked._attn_implementation = "sdpa"
    own = transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny.SIZES))
    own.config = chunked
    assert "full and sliding-window" in (why_no_masks(own, DynamicCache()) or "")


def test_the_shape_of_a_tree() -> None:
    tree = Tree([10, 20, 11, 21, 22], [0, 0, 1, 2, 2])
    assert tree.width == 6
    assert tree.depths == [0, 1, 1, 2, 2, 2]
    assert [list(tree.path(node)) for node in range(6)] == [[0], [0, 1], [0, 2], [0, 1, 3], [0, 2, 4], [0, 2, 5]]
    assert tree.drafted(0) == [10, 20]
    assert (tree.child(2, 22), tree.child(2, 11), tree.child(5, 1)) == (5, None, None)
    marks = [[node in tree.path(row) for node in range(6)] for row in range(6)]
    assert tree.ancestors().tolist() == marks
    chain, same = Chain([4, 5]), Tree([4, 5], [0, 1])
    assert chain.ancestors().tolist() == same.ancestors().tolist()
    assert [list(chain.path(n)) for n in range(3)] == [list(same.path(n)) for n in range(3)]
    assert (chain.depths, chain.width) == (same.depths, same.width)


def test_a_tree_is_cut_before_eos() -> None:
    tree = Tree([10, 20, 11, 21, 22], [0, 0, 1, 2, 2])
    assert tree.before(frozenset({99})) is tree
    cut = tree.before(frozenset({10, 21}))
    assert isinstance(cut, Chain)
    assert cut == Chain([20, 22])
    cut = tree.before(frozenset({20}))
    assert cut == Chain([10, 11])
    cut = tree.before(frozenset({11}))
    assert isinstance(cut, Tree)
    assert (cut.tokens, cut.depths) == ([10, 20, 21, 22], [0, 1, 1, 2, 2])
    assert tree.before(frozenset({10, 20})) == Chain([])


def test_drafts_as_they_were_drafted() -> None:
    drafts = drafters.trees([[(1, -1)], [(5, -1), (6, 0), (7, 0)], []])
    assert as_draft(drafts, 0) == Chain([1])
    tree = as_draft(drafts, 1)
    assert isinstance(tree, Tree)
    assert (tree.tokens, tree.depths) == ([5, 6, 7], [0, 1, 2, 2])
    chains = likeliest_chains(drafts)[0]
    assert [as_draft(chains, row) for row in range(3)] == [Chain([1]), Chain([5, 6]), Chain([])]
    assert chains.parents.tolist() == [-1, -1, 0]
    assert chains.probability.tolist() == drafts.probability[[0, 1, 2]].tolist()
    assert as_draft(drafts, 2) == Chain([])


def test_gathering_in_the_cache() -> None:
    cache = DynamicCache()
    keys = torch.arange(24.0).reshape(1, 1, 12, 2)
    cache.update(keys.clone(), keys + 100, 0)
    gather_newest(cache, 5, [0, 2, 4])
    expected = keys[:, :, [0, 1, 2, 3, 4, 5, 6, 7, 9, 11]]
    assert cache.layers[0].keys[:, :, :10].equal(expected)
    assert cache.layers[0].values[:, :, :10].equal(expected + 100)
    assert np.array_equal(keys[0, 0, :, 0], np.arange(0, 24, 2))


@pytest.mark.model
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_real_model(model: Any, tokenizer: Any, attention: str) -> None:
    chat = [{"role": "user", "content": "What is a suffix automaton? Answer in one sentence."}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    before = model.config._attn_implementation
    model.set_attn_implementation(attention)
    try:
        expected = tiny.plain(model, None, **inputs, max_new_tokens=24)
        ours = Speculative(drafters.true_branch(expected[0].tolist(), 49152))
        assert tiny.speculative(model, None, ours, **inputs, max_new_tokens=24).equal(expected)
    finally:
        model.set_attn_implementation(before)
    assert ours.statistics is not None
    assert ours.statistics.accepted > 10
