"""`return_dict_in_generate`: one entry a token, with the values and shapes that plain decoding gives."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from transformers import StoppingCriteria
from transformers.generation import GenerateDecoderOnlyOutput

from freedraft.integrations.hf import Speculative

one_thread = tiny.one_thread

EVERYTHING = tiny.EVERYTHING
assert_close = tiny.assert_close
WINDOW = 8


@pytest.mark.parametrize("name", tiny.DRAFTERS)
@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("Llama", {}),
        ("Mistral", {"sliding_window": WINDOW}),
        ("Gemma2", {"sliding_window": WINDOW, "num_hidden_layers": 3}),
    ],
)
@pytest.mark.parametrize("sampled", [False, True])
def test_one_entry_a_token(name: str, architecture: str, changes: dict[str, Any], sampled: bool) -> None:
    model = tiny.model(architecture, attn_implementation="eager", **changes)
    options = {**EVERYTHING, "max_new_tokens": 20, "do_sample": sampled, "top_k": 0, "repetition_penalty": 1.1}
    ids = tiny.prompt(5)
    expected = tiny.plain(model, ids, **options)
    ours = Speculative(tiny.DRAFTERS[name](expected.sequences[0].tolist()))
    actual = tiny.speculative(model, ids, ours, **options)
    assert isinstance(actual, GenerateDecoderOnlyOutput)
    assert actual.sequences.equal(expected.sequences)
    for field in ("scores", "logits", "hidden_states", "attentions"):
        assert len(getattr(actual, field)) == 20
        assert_close(getattr(actual, field), getattr(expected, field))


@pytest.mark.parametrize("field", ["output_scores", "output_logits", "output_hidden_states", "output_attentions"])
def test_only_what_was_asked_for(field: str) -> None:
    model = tiny.model(attn_implementation="eager")
    options = {"return_dict_in_generate": True, field: True, "max_new_tokens": 10}
    expected = tiny.plain(model, tiny.prompt(5), **options)
    actual = tiny.speculative(
        model, tiny.prompt(5), Speculative(tiny.DRAFTERS["truth"](expected.sequences[0].tolist())), **options
    )
    given = {"scores", "logits", "hidden_states", "attentions"} & set(actual.keys())
    assert given == {field.removeprefix("output_")}
    assert_close(actual[given.pop()], expected[field.removeprefix("output_")])


def test_nothing_is_collected_without_a_dict() -> None:
    options = {**EVERYTHING, "return_dict_in_generate": False, "max_new_tokens": 10}
    model = tiny.model(attn_implementation="eager")
    tiny.assert_same(model, tiny.prompt(5), tiny.DRAFTERS["truth"], **options)


def test_in_place_processors_leave_the_logits_alone() -> None:
    def add(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores += 100.0
        return scores

    options = {**EVERYTHING, "output_attentions": False}
    ours = Speculative(tiny.DRAFTERS["copying"]([]))
    output = tiny.speculative(tiny.model(), tiny.prompt(5), ours, max_new_tokens=5, logits_processor=[add], **options)
    for scores, logits in zip(output.scores, output.logits, strict=True):
        torch.testing.assert_close(scores, logits + 100.0)


def test_a_criterion_gets_the_scores_so_far() -> None:
    class Counting(StoppingCriteria):
        def __init__(self) -> None:
            self.lengths: list[int] = []

        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            assert isinstance(scores, tuple)
            assert input_ids[0, -1] == scores[-1].argmax()
            self.lengths.append(len(scores))
            return torch.tensor([False])

    counting = Counting()
    text = tiny.plain(tiny.model(), tiny.prompt(5), max_new_tokens=12)[0].tolist()
    tiny.speculative(
        tiny.model(),
        tiny.prompt(5),
        Speculative(tiny.DRAFTERS["half true"](text)),
        max_new_tokens=12,
        stopping_criteria=[counting],
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert counting.lengths == list(range(1, 13))


@pytest.mark.parametrize("name", tiny.DRAFTERS)
@pytest.mark.parametrize("architecture", ["Llama", "Mistral"])
@pytest.mark.parametrize("stop", [10, 11, 14, 25])
def test_the_cache_that_is_returned_can_be_gone_on_with(name: str, architecture: str, stop: int) -> None:
    model = tiny.model(architecture, **({"sliding_window": 64} if architecture == "Mistral" else {}))
    text = tiny.plain(model, tiny.prompt(5), max_new_tokens=40)[0].tolist()
    ours = Speculative(tiny.DRAFTERS[name](text))

    def at(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.tensor([input_ids.shape[1] >= stop])

    output = tiny.speculative(
        model, tiny.prompt(5), ours, max_new_tokens=40, return_dict_in_generate=True, stopping_criteria=[at]
    )
    assert output.sequences[0].tolist() == text[:stop]
    # As after plain decoding, the last token is not in the cache yet.
    assert output.past_key_values.get_seq_length() == stop - 1
    # With a mask, or generate takes every token 2 of the text for padding.
    mask = torch.ones_like(output.sequences)
    rest = model.generate(
        output.sequences, attention_mask=mask, past_key_values=output.past_key_values, max_new_tokens=45 - stop
    )
    assert rest[0].tolist() == text
