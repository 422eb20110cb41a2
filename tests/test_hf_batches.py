"""Batches: every row is decoded as if it were alone, whatever the others accept and wherever they end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import drafters
import numpy as np
import pytest
import tiny
import torch
import transformers
from transformers import DynamicCache, LogitsProcessor, StoppingCriteria
from transformers.generation import GenerateDecoderOnlyOutput

from freedraft.integrations.hf import Speculative, slots
from freedraft.integrations.hf.slots import Slots
from freedraft.plugins.base import Feedback
from freedraft.retrieval.errors import InputError, UnsupportedError

one_thread = tiny.one_thread
assert_close = tiny.assert_close

WINDOW = 8
PAD = tiny.SIZES["pad_token_id"]
LENGTHS = (5, 12, 9, 3)
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": WINDOW},
    "Gemma2": {"sliding_window": WINDOW, "num_hidden_layers": 4},
    "Gemma3Text": {"sliding_window": WINDOW, "num_hidden_layers": 4, "sliding_window_pattern": 2},
    "Qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "GPTNeoX": {},
    "Phi3": {},
}


def model(architecture: str = "Llama", attention: str = "sdpa") -> Any:
    return tiny.model(architecture, attn_implementation=attention, **MODELS[architecture])


def batch(lengths: Sequence[int] = LENGTHS) -> dict[str, torch.Tensor]:
    """Prompts of several lengths, padded on the left."""
    longest = max(lengths)
    rows = [torch.cat([torch.full((1, longest - n), PAD), tiny.prompt(n, seed=n)], dim=1) for n in lengths]
    mask = torch.stack([(torch.arange(longest) >= longest - n).long() for n in lengths])
    return {"input_ids": torch.cat(rows), "attention_mask": mask}


def texts(inputs: dict[str, torch.Tensor], ids: torch.Tensor) -> list[list[int]]:
    """The rows of `ids` without the padding of their prompts."""
    return [row[int((mask == 0).sum()) :].tolist() for row, mask in zip(ids, inputs["attention_mask"], strict=True)]


def alone(which: Any, lengths: Sequence[int] = LENGTHS, **options: Any) -> list[list[int]]:
    return [tiny.plain(which, tiny.prompt(n, seed=n), **options)[0].tolist() for n in lengths]


class Among(drafters.Scripted):
    """A drafter for each text, told apart by how the sequences begin."""

    def __init__(self, rows: Sequence[Sequence[int]], make: Callable[[list[int]], drafters.Scripted]) -> None:
        super().__init__()
        self.inner = [(list(row), make(list(row))) for row in rows]

    def draft(self, slots: Any, budget: Any) -> Any:
        rows = []
        for slot, room in zip(slots.tolist(), budget.tolist(), strict=True):
            text = self.texts[slot]
            _, drafter = next(pair for pair in self.inner if pair[0][: min(3, len(text))] == text[:3])
            if isinstance(drafter, drafters.Branching):
                rows.append(list(drafter.grow(text, room)))
            else:
                # Drafts of all lengths side by side, none included.
                chain = drafter.propose(text, min(room, (3 * slot + len(text)) % 7))
                rows.append([(token, i - 1) for i, token in enumerate(chain)])
        self.calls.append(("draft", budget.tolist()))
        return drafters.trees(rows)


DRAFTERS: dict[str, Callable[[list[int]], drafters.Scripted]] = {
    **tiny.DRAFTERS,
    "true branch": lambda text: drafters.true_branch(text, tiny.VOCABULARY),
    "random trees": lambda text: drafters.random_trees(tiny.VOCABULARY),
}


def assert_same(which: Any, name: str, **options: Any) -> Speculative:
    """Each row of the batch is what it is alone."""
    expected = alone(which, **options)
    drafter = Among(expected, DRAFTERS[name])
    ours = Speculative(drafter)
    inputs = batch()
    assert texts(inputs, tiny.speculative(which, None, ours, **inputs, **options)) == expected
    assert ours.statistics is not None
    assert ours.statistics.drafter_errors == 0
    assert ours.statistics.tokens == sum(len(text) - n for text, n in zip(expected, LENGTHS, strict=True))
    assert drafter.texts == {}
    assert sorted(drafter.closed) == sorted(expected)
    return ours


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize(
    ("architecture", "attention"), [*((each, "sdpa") for each in MODELS), ("Llama", "eager"), ("Gemma2", "eager")]
)
def test_greedy_is_identical_to_each_row_alone(name: str, architecture: str, attention: str) -> None:
    ours = assert_same(model(architecture, attention), name, max_new_tokens=40)
    assert ours.statistics is not None
    if name in ("truth", "true branch"):
        assert ours.statistics.tokens_per_step > 2
        assert ours.statistics.forward_passes < 30
    if name == "never":
        assert ours.statistics.tokens_per_step == 1.0
        assert ours.statistics.steps == 4 * ours.statistics.forward_passes == 160


@pytest.mark.parametrize("name", ["half true", "true branch", "random trees"])
@pytest.mark.parametrize("architecture", ["Llama", "Gemma2"])
def test_rows_are_moved_together_again_and_again(name: str, architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Slots, "SLACK", -20)
    moved = []
    compact = Slots.compact
    monkeypatch.setattr(Slots, "compact", lambda self: moved.append(1) or compact(self))
    assert_same(model(architecture), name, max_new_tokens=40)
    assert len(moved) > 5


def test_learned_positions() -> None:
    config = transformers.GPT2Config(
        vocab_size=tiny.VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=40, initializer_range=0.2,
        bos_token_id=0, eos_token_id=None, pad_token_id=PAD,
    )  # fmt: skip
    torch.manual_seed(3)
    which = transformers.GPT2LMHeadModel(config).eval()
    for name in DRAFTERS:
        # The last position that there is: one more would be an IndexError.
        assert_same(which, name, max_new_tokens=28)


def typed() -> Any:
    """A model that takes token types."""
    config = transformers.GPT2Config(
        vocab_size=tiny.VOCABULARY, n_embd=64, n_layer=2, n_head=4, initializer_range=0.2, eos_token_id=None,
        pad_token_id=PAD,
    )  # fmt: skip
    torch.manual_seed(3)
    return transformers.GPT2LMHeadModel(config).eval()


def by_output(rows: Sequence[Sequence[int]], branching: bool) -> drafters.Scripted:
    """Drafts what follows the end of a text in one of `rows`; the prompt may be unknown, for it may be embedded."""

    def following(text: list[int], budget: int) -> list[int]:
        for begin in range(len(text)):
            for row in rows:
                if list(row[: len(text) - begin]) == text[begin:]:
                    return list(row[len(text) - begin :][:budget])
        return []

    def grow(text: list[int], budget: int) -> list[tuple[int, int]]:
        return [(9, -1), *((token, i if i else -1) for i, token in enumerate(following(text, 4)))][:budget]

    if branching:
        return drafters.Branching(grow)
    return drafters.Scripted(lambda text, budget: following(text, budget)[: len(text) % 5])


@pytest.mark.parametrize("branching", [False, True])
@pytest.mark.parametrize("kind", ["token types", "embedded prompts", "prompts in chunks"])
def test_unusual_inputs(kind: str, branching: bool) -> None:
    which = typed() if kind == "token types" else model()
    options: dict[str, Any] = {**batch(), "max_new_tokens": 30}
    if kind == "token types":
        options["token_type_ids"] = torch.tensor([[5] * 7 + [6 + row] * 5 for row in range(4)])
    else:
        options["eos_token_id"] = ends(which)
    if kind == "embedded prompts":
        options["inputs_embeds"] = which.get_input_embeddings()(options.pop("input_ids")).detach()
    if kind == "prompts in chunks":
        options["prefill_chunk_size"] = 5
    expected = which.generate(**options)
    written = expected[:, 0 if kind == "embedded prompts" else 12 :].tolist()
    ours = Speculative(by_output(written, branching))
    assert which.generate(**options, custom_generate=ours).tolist() == expected.tolist()
    assert ours.statistics is not None
    assert ours.statistics.accepted > 10


def ends(which: Any) -> list[int]:
    """Tokens that end the four rows after different numbers of tokens."""
    endless = alone(which, max_new_tokens=40)
    return [endless[0][5 + 2], endless[1][12 + 13], endless[2][9 + 7]]


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("architecture", ["Llama", "Gemma2"])
def test_rows_that_end_early_are_padded(name: str, architecture: str) -> None:
    which = model(architecture)
    options = {"max_new_tokens": 40, "eos_token_id": ends(which)}
    expected = tiny.plain(which, None, **batch(), **options)
    rows = alone(which, **options)
    assert len({len(row) for row in rows}) > 2
    drafter = Among(alone(which, max_new_tokens=40), DRAFTERS[name])
    ours = Speculative(drafter)
    actual = tiny.speculative(which, None, ours, **batch(), **options)
    assert actual.tolist() == expected.tolist()
    assert sorted(drafter.closed) == sorted(rows)
    assert ours.statistics is not None
    # A row that has ended costs no more steps.
    assert ours.statistics.steps <= ours.statistics.tokens == sum(map(len, rows)) - sum(LENGTHS)


def test_the_drafter_is_told_at_once_that_a_row_ended() -> None:
    which = model()
    options = {"max_new_tokens": 40, "eos_token_id": ends(which)}
    drafter = Among(alone(which, max_new_tokens=40), DRAFTERS["noise"])
    tiny.speculative(which, None, Speculative(drafter), **batch(), **options)
    budgets = [len(details) for method, details in drafter.calls if method == "draft"]
    assert budgets[0] == 4
    assert sorted(budgets, reverse=True) == budgets
    assert set(budgets) >= {1, 2}


def test_rows_that_may_end_early_need_a_pad_token() -> None:
    which = model()

    def first(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.tensor([bool(input_ids[0, 0] == PAD)])

    drafter = drafters.never()
    inputs, ours = batch(), Speculative(drafter)
    config = transformers.GenerationConfig(max_new_tokens=10, pad_token_id=None, eos_token_id=None)
    before, which.generation_config = which.generation_config, config
    try:
        with pytest.raises(InputError, match="pad_token_id"):
            which.generate(**inputs, custom_generate=ours, stopping_criteria=[first])
        # Before any work was done.
        assert drafter.calls == []
        # Not when all end together.
        assert which.generate(**inputs, custom_generate=ours).shape == (4, 22)
    finally:
        which.generation_config = before


def test_several_sequences_a_prompt_are_distributed_as_one_at_a_time() -> None:
    """Chi-squared over the four tokens behind a prompt, with two possible at each place."""
    which, ids = model(), tiny.prompt(6)
    support = [60, 63]
    exact: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(4):
        grown = {}
        for text, chance in exact.items():
            logits = which(torch.cat([ids, torch.tensor([text], dtype=torch.long)], dim=1)).logits[0, -1, support]
            for token, share in zip(support, (logits / 4.0).softmax(-1).tolist(), strict=True):
                grown[(*text, token)] = chance * share
        exact = grown
    ordered = sorted(exact, key=lambda text: -exact[text])

    def grow(text: list[int], budget: int) -> list[tuple[int, int]]:
        likely, unlikely = ordered[0][len(text) - 6 :], ordered[-1][len(text) - 6 :]
        if len(likely) == 2:
            return [(likely[0], -1), (likely[1], 0)]
        nodes = [(likely[0], -1), (unlikely[0], -1)]
        return nodes + ([(likely[1], 0), (unlikely[1], 1)] if len(likely) > 2 else [])

    def four(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.tensor([input_ids.shape[1] == 10])

    ours = Speculative(drafters.Branching(grow))
    torch.manual_seed(5)
    counts: dict[tuple[int, ...], int] = dict.fromkeys(exact, 0)
    draws = 40 * 50
    for _ in range(40):
        output = which.generate(
            ids, custom_generate=ours, num_return_sequences=50, do_sample=True, temperature=4.0, top_k=0,
            max_new_tokens=40, stopping_criteria=[four], suppress_tokens=[t for t in range(200) if t not in support],
        )  # fmt: skip
        for row in output.tolist():
            counts[tuple(row[6:])] += 1
    statistic = sum((counts[text] - draws * chance) ** 2 / (draws * chance) for text, chance in exact.items())
    assert min(exact.values()) * draws > 5
    # 15 degrees of freedom: above 37.70 once in a thousand.
    assert statistic < 37.70
    assert ours.totals.accepted > draws


PROCESSED: dict[str, dict[str, Any]] = {
    "repetition penalty": {"repetition_penalty": 1.7},
    "no repeated bigram": {"no_repeat_ngram_size": 2},
    "min_new_tokens": {"min_new_tokens": 15, "eos_token_id": list(range(100, 200))},
    "sequence bias": {"sequence_bias": [[[32], 40.0], [[32, 32], -30.0]]},
    "forced eos": {"forced_eos_token_id": 9},
    "length penalty": {"exponential_decay_length_penalty": (5, 1.4), "eos_token_id": 7},
    "guidance": {"guidance_scale": 1.5},
    "guidance from prompts": {"guidance_scale": 1.5, "negative_prompt_ids": torch.arange(20, 40).reshape(4, 5)},
    "encoder repetition": {"encoder_repetition_penalty": 1.8},
    "encoder bigrams": {"encoder_no_repeat_ngram_size": 1},
    "allowed tokens": {"prefix_allowed_tokens_fn": lambda row, ids: list(range(40 * row + 5, 40 * row + 45))},
}


@pytest.mark.parametrize("name", ["half true", "true branch"])
@pytest.mark.parametrize("which", PROCESSED)
def test_processors_as_in_a_plain_batch(name: str, which: str) -> None:
    options = {"max_new_tokens": 20, **PROCESSED[which]}
    expected = tiny.plain(model(), None, **batch(), **options)
    ours = Speculative(Among(texts(batch(), expected), DRAFTERS[name]))
    assert tiny.speculative(model(), None, ours, **batch(), **options).tolist() == expected.tolist()
    assert ours.statistics is not None
    assert ours.statistics.accepted > 0


class Counting(LogitsProcessor):
    """Its effect depends on how often it was called."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        assert scores.shape == (1, tiny.VOCABULARY)
        self.calls += 1
        if self.calls % 3 == 0:
            scores[:, (37 * self.calls) % tiny.VOCABULARY] += 50.0
        return scores


@pytest.mark.parametrize("name", ["half true", "true branch"])
def test_anyone_elses_processors_and_criteria_are_copied_for_each_row(name: str) -> None:
    class Third(StoppingCriteria):
        """Stops at the third even token."""

        def __init__(self) -> None:
            self.even = 0

        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            self.even += int(input_ids[0, -1] % 2 == 0)
            return torch.tensor([self.even == 3])

    which = model()
    expected = [
        tiny.plain(
            which, tiny.prompt(n, seed=n), max_new_tokens=30, logits_processor=[Counting()], stopping_criteria=[Third()]
        )[0].tolist()
        for n in LENGTHS
    ]
    assert len({len(text) - n for text, n in zip(expected, LENGTHS, strict=True)}) > 1
    processor, criterion = Counting(), Third()
    inputs = batch()
    output = tiny.speculative(
        which, None, Speculative(Among(expected, DRAFTERS[name])), **inputs, max_new_tokens=30,
        logits_processor=[processor], stopping_criteria=[criterion],
    )  # fmt: skip
    longest = output.shape[1]
    for text, row, n in zip(texts(inputs, output), expected, LENGTHS, strict=True):
        assert text == row + [PAD] * (longest - 12 - (len(row) - n))
    assert processor.calls == criterion.even == 0


def test_what_cannot_be_copied_is_refused() -> None:
    class Locked(Counting):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("holds a lock")

    with pytest.raises(UnsupportedError, match=r"Locked can't be copied.*holds a lock.*call generate for each prompt"):
        tiny.speculative(
            model(), None, Speculative(drafters.never()), **batch(), max_new_tokens=5, logits_processor=[Locked()]
        )
    # Alone it works.
    tiny.speculative(
        model(), tiny.prompt(), Speculative(drafters.never()), max_new_tokens=5, logits_processor=[Locked()]
    )


@pytest.mark.parametrize("name", ["half true", "true branch"])
def test_stop_strings(name: str) -> None:
    which, tokenizer = model(), tiny.tokenizer()
    endless = alone(which, max_new_tokens=30)
    stops = [tokenizer.decode(endless[0][20:22]), tokenizer.decode(endless[2][15:16])]
    expected = alone(which, max_new_tokens=30, stop_strings=stops, tokenizer=tokenizer)
    ours = Speculative(Among(endless, DRAFTERS[name]), tokenizer=tokenizer)
    inputs = batch()
    output = tiny.speculative(which, None, ours, **inputs, max_new_tokens=30, stop_strings=stops)
    assert len({len(row) for row in expected}) > 2
    for text, row in zip(texts(inputs, output), expected, strict=True):
        assert text[: len(row)] == row
        assert set(text[len(row) :]) <= {PAD}


@pytest.mark.parametrize("architecture", ["Llama", "Mistral", "Gemma2"])
@pytest.mark.parametrize("name", ["half true", "true branch", "never"])
def test_outputs_have_one_entry_a_token(architecture: str, name: str) -> None:
    which = model(architecture, "eager")
    options = {**tiny.EVERYTHING, "max_new_tokens": 15, "repetition_penalty": 1.1}
    expected = tiny.plain(which, None, **batch(), **options)
    ours = Speculative(Among(texts(batch(), expected.sequences), DRAFTERS[name]))
    actual = tiny.speculative(which, None, ours, **batch(), **options)
    assert isinstance(actual, GenerateDecoderOnlyOutput)
    assert actual.sequences.equal(expected.sequences)
    for field in ("scores", "logits"):
        assert_close(getattr(actual, field), getattr(expected, field))
    # What padding computes, nobody should look at.
    real = batch()["attention_mask"].bool()
    for token in range(15):
        for layer, other in zip(actual.hidden_states[token], expected.hidden_states[token], strict=True):
            assert layer.shape == other.shape
            where = real if token == 0 else torch.ones((4, 1), dtype=torch.bool)
            torch.testing.assert_close(layer[where], other[where], atol=1e-4, rtol=1e-4)
        for layer, other in zip(actual.attentions[token], expected.attentions[token], strict=True):
            assert layer.shape == other.shape
            if token:
                torch.testing.assert_close(layer, other, atol=1e-4, rtol=1e-4)


def test_outputs_behind_the_end_of_a_row_are_zeros() -> None:
    which = model(attention="eager")
    options = {**tiny.EVERYTHING, "max_new_tokens": 40, "eos_token_id": ends(which)}
    rows = alone(which, max_new_tokens=40, eos_token_id=ends(which))
    ours = Speculative(Among(rows, DRAFTERS["half true"]))
    output = tiny.speculative(which, None, ours, **batch(), **options)
    new = [len(row) - n for row, n in zip(rows, LENGTHS, strict=True)]
    assert len(output.scores) == len(output.attentions) == max(new)
    for row, count in enumerate(new):
        assert all(scores[row].any() for scores in output.scores[:count])
        assert not any(scores[row].any() for scores in output.scores[count:])
        assert not any(layers[-1][row].any() for layers in output.hidden_states[count:])


@pytest.mark.parametrize("name", ["half true", "true branch", "never"])
def test_the_cache_that_is_returned_can_be_gone_on_with(name: str) -> None:
    which, inputs = model(), batch()
    full = tiny.plain(which, None, **inputs, max_new_tokens=40)
    ours = Speculative(Among(texts(inputs, full), DRAFTERS[name]))
    first = tiny.speculative(which, None, ours, **inputs, max_new_tokens=22, return_dict_in_generate=True)
    cache = first.past_key_values
    assert cache.get_seq_length() == 12 + 22 - 1
    mask = torch.cat([inputs["attention_mask"], torch.ones((4, 22), dtype=torch.long)], dim=1)
    rest = {"attention_mask": mask, "past_key_values": cache, "max_new_tokens": 18}
    if name == "never":
        assert which.generate(first.sequences, **rest).tolist() == full.tolist()
    else:
        assert tiny.speculative(which, first.sequences, ours, **rest).tolist() == full.tolist()


def test_the_cache_holds_the_rows_that_ended_too() -> None:
    which, inputs = model(), batch()
    options = {"max_new_tokens": 40, "eos_token_id": ends(which)}
    rows = alone(which, **options)
    cache = DynamicCache(config=which.config)
    ours = Speculative(Among(rows, DRAFTERS["half true"]))
    output = tiny.speculative(which, None, ours, **inputs, **options, past_key_values=cache)
    assert cache.layers[0].keys.shape[0] == 4
    for row, text in enumerate(rows):
        start = 12 - LENGTHS[row]
        kept = len(text) - 1
        past = which(torch.tensor([text[:-1]]), use_cache=True).past_key_values
        for ours_layer, plain_layer in zip(cache.layers, past.layers, strict=True):
            held = ours_layer.values[row, :, start : start + kept]
            torch.testing.assert_close(held, plain_layer.values[0], atol=1e-4, rtol=1e-4)
    assert output.shape[0] == 4


def test_a_cache_in_use() -> None:
    which, inputs = model(), batch((9, 9, 9))
    ids = torch.cat([inputs["input_ids"], torch.arange(12).reshape(3, 4) + 20], dim=1)
    expected = tiny.plain(which, ids, max_new_tokens=20)
    cache = which(ids[:, :-1], use_cache=True).past_key_values
    drafter = drafters.Scripted(
        lambda text, budget: next(row for row in expected.tolist() if row[:13] == text[:13])[len(text) :][:budget][:4]
    )
    assert tiny.speculative(which, ids, Speculative(drafter), past_key_values=cache, max_new_tokens=20).equal(expected)


def refused(which: Any, match: str, ours: Speculative | None = None, **options: Any) -> None:
    with pytest.raises(UnsupportedError, match=match):
        tiny.speculative(which, None, ours or Speculative(drafters.never()), **batch(), max_new_tokens=5, **options)


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    which = model("Mistral")
    inputs = batch()
    used = which(inputs["input_ids"][:, :-1], use_cache=True, past_key_values=DynamicCache(config=which.config))
    refused(which, "sliding-window cache that is in use", past_key_values=used.past_key_values)
    refused(model(), "a streamer with a batch of 4", Speculative(drafters.never(), streamer=object()))
    monkeypatch.setattr(
        "freedraft.integrations.hf.target.why_no_masks", lambda model, cache: "attention 'flash' takes no mask"
    )
    refused(model(), "a batch of 4 sequences: attention 'flash' takes no mask; or call generate for each prompt")


@pytest.mark.parametrize("chance", [0.2, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_a_drafter_that_raises_changes_nothing_but_the_speed(chance: float, seed: int) -> None:
    which, inputs = model(), batch()
    expected = alone(which, max_new_tokens=60)
    inner = Among(expected, DRAFTERS["truth"])

    def propose(text: list[int], budget: int) -> list[int]:
        return next(row for row, _ in inner.inner if row[:3] == text[:3])[len(text) :][: min(budget, len(text) % 4)]

    drafter = drafters.Raising(drafters.Scripted(propose), chance, seed)
    ours = Speculative(drafter)
    assert texts(inputs, tiny.speculative(which, None, ours, **inputs, max_new_tokens=60)) == expected
    assert ours.statistics is not None
    assert ours.statistics.drafter_errors == drafter.raised > 0
    assert (ours.statistics.accepted > 0) == (chance < 1.0)


class Listening(Among):
    feedback: ClassVar[frozenset[Any]] = frozenset({"accepted", "argmax", "top_k"})
    feedback_top_k = 3


@pytest.mark.parametrize("name", ["half true", "true branch"])
def test_feedback_of_every_row(name: str) -> None:
    which, inputs = model(), batch()
    options = {"max_new_tokens": 30, "eos_token_id": ends(which)}
    rows = alone(which, max_new_tokens=30)
    told: list[tuple[list[list[int]], Feedback]] = []

    class Keeping(Listening):
        def observe(self, slots: Any, feedback: Feedback) -> None:
            told.append(([list(self.texts[slot]) for slot in slots.tolist()], feedback))
            super().observe(slots, feedback)

    drafter = Keeping(rows, DRAFTERS[name])
    ours = Speculative(drafter)
    tiny.speculative(which, None, ours, **inputs, **options)
    assert ours.statistics is not None
    assert sum(int(feedback.accepted.sum()) for _, feedback in told) == ours.statistics.accepted > 0
    assert {len(before) for before, _ in told} > {1, 4}
    for before, feedback in told:
        assert len(feedback.accepted) == len(feedback.offsets) - 1 == len(before)
        assert feedback.argmax is not None
        assert feedback.top_k is not None
        assert len(feedback.argmax) == len(feedback.top_k) == feedback.offsets[-1]
        for text, at in zip(before, feedback.offsets.tolist(), strict=False):
            logits = which(torch.tensor([text])).logits[0, -1]
            assert feedback.argmax[at] == logits.argmax()
            assert feedback.top_k[at].tolist() == logits.topk(3).indices.tolist()


def test_our_own_drafter_on_a_batch() -> None:
    which, inputs = model(), batch()
    only_three: dict[str, Any] = {"suppress_tokens": [*range(50), *range(53, tiny.VOCABULARY)], "max_new_tokens": 60}
    expected = alone(which, **only_three)
    ours = Speculative("suffix_automaton", min_expected=0)
    assert texts(inputs, tiny.speculative(which, None, ours, **inputs, **only_three)) == expected
    assert ours.statistics is not None
    assert ours.statistics.drafter_errors == 0
    assert ours.statistics.tokens_per_step > 1.2


def test_pacing_sees_all_rows() -> None:
    which, inputs = model(), batch()
    ours = Speculative(Among(alone(which, max_new_tokens=40), DRAFTERS["half true"]), pacing="on")
    told: list[tuple[int, int]] = []
    pacer = ours._pacer
    assert pacer is not None
    pacer.cut = lambda drafts, sequences, **_: told.append((drafts.rows, sequences)) or drafts  # type: ignore[assignment,func-returns-value]
    recorded: list[tuple[int, int]] = []
    pacer.record = lambda sequences, drafted, *_: recorded.append((sequences, drafted))  # type: ignore[assignment]
    passes: list[tuple[int, int]] = []
    handle = which.register_forward_pre_hook(
        lambda _, args, kwargs: passes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        tiny.speculative(which, None, ours, **inputs, max_new_tokens=40)
    finally:
        handle.remove()
    assert told[0] == (4, 4)
    assert all(rows == sequences for rows, sequences in told)
    # Rows end at different places, and drafts differ in length: each row is padded to the longest.
    assert recorded == [(rows, rows * (width - 1)) for rows, width in passes[1:]]
    assert {rows for rows, _ in passes} > {4}
    assert len(ours.pacing["calibration"]) > 0  # type: ignore[index]


class NaiveSlots:
    """What `Slots` should do, as lists of entries: one list a row, holes being None."""

    def __init__(self, rows: int, count: int) -> None:
        self.rows = {row: [(row, i) for i in range(count)] for row in range(rows)}
        self.ended: dict[int, list[tuple[int, int]]] = {}

    def keep(self, paths: dict[int, list[int]], fresh: dict[int, list[tuple[int, int]]]) -> None:
        for row, path in paths.items():
            self.rows[row] += [fresh[row][node] for node in path]

    def end(self, over: list[int]) -> None:
        for row in over:
            self.ended[row] = self.rows.pop(row)


@pytest.mark.parametrize("seed", range(12))
def test_slots_against_lists(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots.Slots, "SLACK", int(np.random.default_rng(seed).integers(-10, 10)))
    dice = np.random.default_rng(seed)
    count, prompt = 4, int(dice.integers(1, 6))
    stamp = 100

    def entries(rows: Sequence[Sequence[tuple[int, int]]]) -> torch.Tensor:
        return torch.tensor(rows, dtype=torch.float32)[:, None]

    naive, cache = NaiveSlots(count, prompt), DynamicCache()
    first = entries([naive.rows[row] for row in range(count)])
    cache.update(first, first + 0.5, 0)
    padding = torch.ones((count, prompt))
    padding[0, 0] = 0 if prompt > 1 else 1
    ours = Slots(cache, padding, count)
    for _ in range(25):
        width = int(dice.integers(1, 6))
        fresh = {row: [(row, stamp + i) for i in range(width)] for row in ours.rows}
        stamp += width
        new = entries([fresh[row] for row in ours.rows])
        cache.update(new, new + 0.5, 0)
        paths = {}
        for row in ours.rows:
            chosen = sorted(dice.choice(width, size=int(dice.integers(1, width + 1)), replace=False).tolist())
            paths[row] = [0, *[node for node in chosen if node]]
        ours.keep(width, [paths[row] for row in ours.rows])
        naive.keep(paths, fresh)
        if len(ours.rows) > 1 and dice.random() < 0.12:
            over = ours.rows[int(dice.integers(len(ours.rows)))]
            ours.end([row == over for row in ours.rows])
            naive.end([over])
        assert ours.lengths.tolist() == [len(naive.rows[row]) for row in ours.rows]
        slot_count = cache.get_seq_length()
        assert ours.visible.shape == ours.places.shape == (len(ours.rows), slot_count)
        assert ours.holes.tolist() == [slot_count - len(naive.rows[row]) for row in ours.rows]
        for i, row in enumerate(ours.rows):
            columns = ours.columns(i)
            assert cache.layers[0].keys[i, 0, columns].tolist() == [list(map(float, e)) for e in naive.rows[row]]
            assert ours.places[i, columns].tolist() == list(range(len(columns)))
            hidden = 1 if row == 0 and prompt > 1 else 0
            assert ours.visible[i].nonzero().flatten().tolist() == columns[hidden:]
    ours.restore()
    whole = {**naive.rows, **naive.ended}
    keys, values = cache.layers[0].keys, cache.layers[0].values
    assert keys.shape == (count, 1, max(map(len, whole.values())), 2)
    for row in range(count):
        expected = torch.tensor(whole[row], dtype=torch.float32)
        assert keys[row, 0, : len(expected)].equal(expected)
        assert values[row, 0, : len(expected)].equal(expected + 0.5)


@pytest.mark.model
def test_a_real_model(model: Any, tokenizer: Any) -> None:
    questions = ["Say hello.", "Name three colours, one a line.", "Repeat: one two three one two three", "What is 2+2?"]
    chats = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True, tokenize=False)
        for q in questions
    ]
    ids = [tokenizer(chat, return_tensors="pt", add_special_tokens=False)["input_ids"] for chat in chats]
    longest = max(row.shape[1] for row in ids)
    pad = model.generation_config.pad_token_id
    inputs = {
        "input_ids": torch.cat([torch.nn.functional.pad(row, (longest - row.shape[1], 0), value=pad) for row in ids]),
        "attention_mask": torch.stack([(torch.arange(longest) >= longest - row.shape[1]).long() for row in ids]),
    }
    output = tiny.plain(model, None, **inputs, max_new_tokens=24)
    ours = Speculative("suffix_automaton", min_expected=0)
    actual = tiny.speculative(model, None, ours, **inputs, max_new_tokens=24)
    assert actual.tolist() == output.tolist()
    for row, single in enumerate(ids):
        expected = tiny.plain(model, single, max_new_tokens=24)[0, single.shape[1] :].tolist()
        got = actual[row, longest:].tolist()
        assert got[: len(expected)] == expected
        assert set(got[len(expected) :]) <= {pad}
    assert ours.statistics is not None
    assert ours.statistics.accepted > 0
